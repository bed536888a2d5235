"""A denoising task is an interval of timesteps, defined here and nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_modules.errors import UserInputError


@dataclasses.dataclass(frozen=True)
class TimestepIntervals:
    """A partition of the timesteps 0 .. T - 1 into K consecutive intervals, the tasks.

    Task k holds the timesteps ``bounds[k] <= t < bounds[k + 1]``; task 0 has the least noise. Build one with
    `uniform`, `log_snr` or `explicit`. Samplers, probes, clustering and plots all take this object.

    Attributes:
        bounds: K + 1 strictly increasing integers from 0 to T.
        spacing: ``"uniform"``, ``"log_snr"`` or ``"explicit"``: how the bounds were chosen.
    """

    bounds: tuple[int, ...]
    spacing: str = "explicit"

    def __post_init__(self) -> None:
        increasing = all(low < high for low, high in zip(self.bounds, self.bounds[1:], strict=False))
        if len(self.bounds) < 2 or self.bounds[0] != 0 or not increasing:
            raise UserInputError(
                f"interval bounds must start at 0 and increase strictly up to T, got {list(self.bounds)}"
            )

    @classmethod
    def uniform(cls, num_timesteps: int, num_intervals: int) -> TimestepIntervals:
        """K intervals of equal width in t; where K does not divide T, widths differ by at most one."""
        _check_count(num_timesteps, num_intervals)
        edges = [(k * num_timesteps) // num_intervals for k in range(num_intervals + 1)]
        return cls(tuple(edges), "uniform")

    @classmethod
    def log_snr(cls, log_snr: Sequence[float] | np.ndarray | Tensor, num_intervals: int) -> TimestepIntervals:
        """K intervals of equal width in log-SNR, each with at least one timestep.

        Args:
            log_snr: Logarithm of the signal-to-noise ratio per timestep, strictly decreasing, length T.
            num_intervals: K.

        Raises:
            UserInputError: If there are fewer timesteps than intervals, or ``log_snr`` does not decrease.
        """
        values = torch.as_tensor(log_snr, dtype=torch.float64).cpu().numpy()
        _check_count(len(values), num_intervals)
        if not np.isfinite(values).all() or (np.diff(values) >= 0).any():
            raise UserInputError("log-SNR must be finite and decrease with t: check the noise schedule")
        edges = np.linspace(values[0], values[-1], num_intervals + 1)[1:-1]
        bounds = np.concatenate([[0], np.searchsorted(-values, -edges), [len(values)]])
        # A steep schedule can leave an interval without a timestep; shift its bounds just far enough to give it one.
        for k in range(1, num_intervals):
            bounds[k] = max(bounds[k], bounds[k - 1] + 1)
        for k in range(num_intervals - 1, 0, -1):
            bounds[k] = min(bounds[k], bounds[k + 1] - 1)
        return cls(tuple(int(b) for b in bounds), "log_snr")

    @classmethod
    def explicit(cls, bounds: Sequence[int]) -> TimestepIntervals:
        """The intervals with the given K + 1 bounds, ``bounds[0] = 0`` and ``bounds[-1] = T``."""
        return cls(tuple(int(b) for b in bounds), "explicit")

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.bounds[-1]

    @property
    def num_intervals(self) -> int:
        """K."""
        return len(self.bounds) - 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of timesteps in each interval, length K."""
        return tuple(high - low for low, high in zip(self.bounds, self.bounds[1:], strict=False))

    def task_of(self, t: Tensor) -> Tensor:
        """Task of each timestep: ``t`` of any shape, integer or continuous in [0, T) -> same shape, int64."""
        inner = torch.tensor(self.bounds[1:-1], device=t.device)
        return torch.bucketize(t, inner, right=True)

    def importance(self, t: Tensor) -> Tensor:
        """Weight that makes a stratified batch estimate the loss averaged uniformly over t, shape of ``t``.

        `sample_stratified` visits an interval with probability 1 / K instead of width / T, so the weight is
        K width / T: exactly 1 for intervals of equal width.
        """
        ratio = torch.tensor(self.widths, dtype=torch.float32, device=t.device)
        return (ratio * (self.num_intervals / self.num_timesteps))[self.task_of(t)]

    def sample_uniform(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Timesteps drawn uniformly from 0 .. T - 1, shape (B,), int64, on the generator's device."""
        return torch.randint(self.num_timesteps, (batch,), generator=generator, device=_device(generator))

    def sample_within(self, task: int, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Timesteps drawn uniformly from one task's interval, shape (B,), int64, on the generator's device."""
        low, high = self.bounds[task], self.bounds[task + 1]
        return torch.randint(low, high, (batch,), generator=generator, device=_device(generator))

    def sample_stratified(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Equal counts per task, ordered by task; uniform within each interval. Shape (B,), int64.

        Where K does not divide B, the remaining samples go to tasks drawn at random without replacement, so that no
        task is favoured over many steps.
        """
        device = _device(generator)
        share, remainder = divmod(batch, self.num_intervals)
        counts = torch.full((self.num_intervals,), share, device=device)
        lucky = torch.randperm(self.num_intervals, generator=generator, device=device)[:remainder]
        counts[lucky] += 1
        task = torch.repeat_interleave(torch.arange(self.num_intervals, device=device), counts)
        low = torch.tensor(self.bounds[:-1], device=device)[task]
        width = torch.tensor(self.widths, device=device)[task]
        # Doubles in [0, 1): the product stays below the width for every width that fits a timestep count.
        offset = torch.rand(batch, generator=generator, device=device, dtype=torch.float64) * width
        return low + offset.long()


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _check_count(num_timesteps: int, num_intervals: int) -> None:
    if not 1 <= num_intervals <= num_timesteps:
        raise UserInputError(
            f"cannot split {num_timesteps} timesteps into {num_intervals} intervals: "
            f"choose between 1 and {num_timesteps}"
        )
