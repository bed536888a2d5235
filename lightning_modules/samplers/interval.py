"""The two samplers that need nothing but the tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.samplers.base import TimestepSampler


class StratifiedSampler(TimestepSampler):
    """Equal counts per task and, weighted, the average over uniform t: `TimestepIntervals.sample_stratified`."""

    is_weighted = True

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """See `TimestepIntervals.sample_stratified`."""
        return self.intervals.sample_stratified(count, generator)

    def importance(self, t: Tensor) -> Tensor:
        """See `TimestepIntervals.importance`."""
        return self.intervals.importance(t)

    def interval_importance(self) -> Tensor:
        """See `TimestepSampler`."""
        return self.intervals.importance(torch.tensor(self.intervals.bounds[:-1])).double()


class UniformSampler(TimestepSampler):
    """Independent uniform timesteps: `TimestepIntervals.sample_uniform`."""

    is_weighted = False

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """See `TimestepIntervals.sample_uniform`."""
        return self.intervals.sample_uniform(count, generator)

    def importance(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`: ones."""
        return torch.ones(t.shape, dtype=torch.float32, device=t.device)

    def interval_importance(self) -> Tensor:
        """See `TimestepSampler`: ones."""
        return torch.ones(self.intervals.num_intervals, dtype=torch.float64)
