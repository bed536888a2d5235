"""The average over the processes of a distributed training, as training takes it of gradients."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class ProcessAverage:
    """Averages group gradients over processes, in place.

    A mean loss per process weighs samples unequally where batches are unequal. Here all samples weigh the same.

    Args:
        counts: Samples per group of this process (G,).
        mean: Whether each process's loss is a mean over its batch, or a sum.
    """

    def __init__(self, counts: Tensor, mean: bool) -> None:
        self.world = dist.get_world_size()
        self._counts = counts
        self._mean = mean
        self._share: float | None = None

    def __call__(self, rows: Tensor) -> None:
        """Averages ``rows`` (G, n). All processes must take part, in the same order."""
        if self._share is None:
            total = self._counts.sum()
            own = float(total)
            dist.all_reduce(total)
            self._share = own / float(total) if self._mean else 1 / self.world
        rows *= self._share
        dist.all_reduce(rows)
