"""Count, sum and sum of squares of a loss at every timestep: what means over intervals are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.timesteps import TimestepIntervals
from lightning_modules.tracking.records import interval_labels


def add_moments(moments: Tensor, t: Tensor, values: Tensor) -> None:
    """Adds count, sum and sum of squares of ``values`` (B,) at ``t`` (B,) to ``moments`` (3, T), in place."""
    values = values.detach().to(moments.dtype)
    moments.index_add_(1, t, torch.stack([torch.ones_like(values), values, values.square()]))


def interval_means(moments: Tensor, intervals: TimestepIntervals, name: str) -> dict[str, Tensor]:
    """``name`` for the mean over uniform t and ``name_<interval>`` for each interval, from moments (3, T).

    Each interval's mean weighs by its width in the first.
    """
    task = intervals.task_of(torch.arange(intervals.num_timesteps, device=moments.device))
    count, total = (
        torch.zeros(intervals.num_intervals, dtype=moments.dtype, device=moments.device).index_add_(0, task, row)
        for row in moments[:2]
    )
    means = total / count
    widths = torch.tensor(intervals.widths, dtype=means.dtype, device=means.device)
    metrics = {name: (means * widths).sum() / widths.sum()}
    for label, mean in zip(interval_labels(intervals.bounds), means, strict=True):
        metrics[f"{name}_{label}"] = mean
    return {key: value.float() for key, value in metrics.items()}
