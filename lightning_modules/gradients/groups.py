"""The assignment of a batch's samples to groups, and sums over groups."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


def split_tasks(task: Tensor, num_tasks: int, halves: int) -> Tensor:
    """Divides each task's samples into ``halves`` disjoint groups of consecutive samples, as equal as can be.

    Consecutive, so that a batch ordered by task is ordered by group too: the Gramian is cheapest then. Within a task
    samples must be in random order, as drawn: halves are meant to differ by chance alone, and sorted by t, say, they
    would not.

    Args:
        task: Task of each sample, (B,), in any order.
        num_tasks: K.
        halves: 1 or more groups per task.

    Returns:
        Group of each sample, (B,): ``task * halves + half``.

    Raises:
        ValueError: If tasks are not integers from 0 to K - 1, or there is not at least one half.
    """
    if (
        halves < 1
        or task.is_floating_point()
        or (len(task) and not 0 <= int(task.min()) <= int(task.max()) < num_tasks)
    ):
        raise ValueError(f"tasks must be integers in 0..{num_tasks - 1} and halves at least 1, got {task} and {halves}")
    members = nn.functional.one_hot(task, num_tasks)
    position = (members.cumsum(0) - 1).gather(1, task[:, None]).squeeze(1)
    return task * halves + position * halves // members.sum(0)[task]


class Groups:
    """Which sample belongs to which group, in the forms that operators need.

    Reading the sizes costs one synchronisation of the device; nothing later does.

    Attributes:
        group: Group of each sample (B,).
        size: B, number of samples.
        num_groups: G.
        counts: Samples per group (G,), int64; ``counts_list`` as numbers.
        equal: Whether all groups have the same number of samples.
        ordered: Whether the samples of a group are next to one another, in the order of the groups.

    Raises:
        ValueError: If ``group`` is not a vector of integers from 0 to G - 1.
    """

    def __init__(self, group: Tensor, num_groups: int) -> None:
        if not isinstance(group, Tensor) or group.dim() != 1 or group.is_floating_point() or not len(group):
            raise ValueError(
                f"group must be a non-empty vector (B,) of integers, got {group.dtype} {tuple(group.shape)}"
            )
        values = group.tolist()
        low, high = min(values), max(values)
        if low < 0 or high >= num_groups:
            raise ValueError(f"groups must lie in 0..{num_groups - 1}, got {low}..{high}")
        self.size = len(group)
        self.num_groups = num_groups
        self.counts = torch.bincount(group, minlength=num_groups)
        self.counts_list: list[int] = np.bincount(values, minlength=num_groups).tolist()
        self.equal = len(set(self.counts_list)) == 1
        self.ordered = values == sorted(values)
        self._order = None if self.ordered else group.argsort(stable=True)
        self.group = group
        self._members: dict[torch.dtype, Tensor] = {}

    def arrange(self, values: Tensor) -> Tensor:
        """Rows of ``values`` (B, ...) ordered by group; the same tensor if they are already."""
        return values if self._order is None else values.index_select(0, self._order)

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Each group that has samples, and its rows in an arranged tensor."""
        start = 0
        for index, size in enumerate(self.counts_list):
            if size:
                yield index, slice(start, start + size)
            start += size

    def members(self, dtype: torch.dtype) -> Tensor:
        """The indicator matrix (G, B): 1 where a sample belongs to a group."""
        if dtype not in self._members:
            self._members[dtype] = nn.functional.one_hot(self.group, self.num_groups).T.to(dtype)
        return self._members[dtype]

    def sum(self, values: Tensor) -> Tensor:
        """Sums the rows of ``values`` (B * m, P), m consecutive rows per sample, within each group: (G, P)."""
        per_sample = values.reshape(self.size, -1, values.shape[-1])
        if self.equal and self._order is None:
            return per_sample.reshape(self.num_groups, -1, values.shape[-1]).sum(1)
        if per_sample.shape[1] > 1:
            per_sample = per_sample.sum(1, keepdim=True)
        return self.members(values.dtype) @ per_sample.squeeze(1)

    def stacked(self, values: Tensor) -> Tensor:
        """Arranged rows (B, m, P) as (G, rows of a group, P); groups must be equal."""
        return values.reshape(self.num_groups, -1, values.shape[-1])


def mean_factors(counts: Tensor, sum_over: int) -> Tensor:
    """Factors (G,) that turn a group's part of the batch's gradient into the gradient of its mean loss.

    Args:
        counts: Samples per group (G,), over all processes.
        sum_over: 0 for a loss that is a mean over the batch, else the number of processes whose sums were averaged.
    """
    exact = counts.to(torch.float32 if counts.device.type == "mps" else torch.float64)
    return torch.where(counts > 0, (sum_over or exact.sum()) / exact, 0.0)


def grouped_products(groups: Groups, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """For each group the sum over its rows of left' right: the weight gradient of a linear layer, split by group.

    Args:
        groups: The groups.
        left: Gradients of the layer's output (B, m, p), arranged.
        right: The layer's input (B, m, d), arranged.
        out: Where to write, (G, p, d).
    """
    if groups.equal:
        return torch.bmm(groups.stacked(left).transpose(1, 2), groups.stacked(right), out=out)
    out.zero_()
    for index, rows in groups.slices():
        torch.mm(left[rows].flatten(0, 1).T, right[rows].flatten(0, 1), out=out[index])
    return out
