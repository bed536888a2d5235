"""Improved DDPM's importance sampling by the loss (Nichol & Dhariwal, 2021, arXiv 2102.09672, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.samplers.base import DistributionSampler
from lightning_modules.timesteps import TimestepIntervals


class LossSecondMomentSampler(DistributionSampler):
    """Timesteps in proportion to the root of the mean square of their latest losses; changes the variance only.

    ``p_t ~ sqrt(E[L_t^2])`` (equation 18) over a history of the losses of each t, mixed with a little of the uniform
    distribution, and uniform until every timestep's history is full. The paper has a history of 10 losses; the
    share of 0.001 uniform is its code's. There timesteps are drawn independently, here in systematic counts per task.

    Under several processes give every process the samples of all, or each will have its own distribution, and a
    checkpoint that of the first alone.

    Args:
        intervals: The tasks.
        history: Losses that a timestep remembers.
        uniform: Share of the uniform distribution.
    """

    is_weighted = True
    varies_within = True
    observes_losses = True
    history: Tensor  # (T, history) the latest losses, in no particular order
    seen: Tensor  # (T,) how many losses there were, int64

    def __init__(self, intervals: TimestepIntervals, history: int, uniform: float) -> None:
        super().__init__(intervals)
        self.uniform = uniform
        self.register_buffer("history", torch.zeros(intervals.num_timesteps, history))
        self.register_buffer("seen", torch.zeros(intervals.num_timesteps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """See `DistributionSampler`."""
        size = self.intervals.num_timesteps
        root = self.history.double().square().mean(1).sqrt()
        informed = (self.seen >= self.history.shape[1]).all() & (root.sum() > 0)
        root = torch.where(informed, root, 1.0)
        return (1 - self.uniform) * root / root.sum() + self.uniform / size

    @torch.no_grad()
    def observe_losses(self, t: Tensor, losses: Tensor) -> None:
        """See `TimestepSampler`. Losses that are not finite are left out."""
        losses = losses.detach()
        finite = losses.isfinite()
        t, losses = t[finite].to(self.seen.device), losses[finite].to(self.history)
        order = t.argsort(stable=True)
        t, losses = t[order], losses[order]
        times, counts = torch.unique_consecutive(t, return_counts=True)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        number = torch.arange(len(t), device=t.device) - first  # counts the batch's losses of the same timestep
        length = self.history.shape[1]
        latest = number >= torch.repeat_interleave(counts, counts) - length
        slot = (self.seen[t] + number) % length
        self.history[t[latest], slot[latest]] = losses[latest]
        self.seen[times] += counts
