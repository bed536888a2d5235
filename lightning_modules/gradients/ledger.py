"""Book-keeping of a backward pass: which parameter's group gradients are complete, and where they go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.gradients.backward import gradients_at
from lightning_modules.gradients.collectors import Collector, GramianCollector
from lightning_modules.gradients.groups import Groups

WORKSPACE_BYTES = 16 * 2**20
"""Group gradients of a large weight are computed in pieces of this size, which fits a CPU's cache."""


class Operand(NamedTuple):
    """A tensor that meets the batch: a parameter, or something computed from parameters alone.

    Attributes:
        tensor: The tensor.
        params: Numbers of the parameters it comes from.
        leaf: Whether it is the parameter itself.
    """

    tensor: Tensor
    params: tuple[int, ...]
    leaf: bool


class _Nobody:
    """A collector that forgets."""

    def collect(self, index: int, start: int, rows: Tensor) -> None:
        """Takes a piece."""

    def finish(self, factors: Tensor) -> None:
        """Ends a measurement."""


class Ledger:
    """Passes group gradients on to a collector once a parameter's gradient is complete.

    A parameter used once is passed on piece by piece, and nothing is kept. One used several times must be summed over
    its uses before any inner product, so its group gradients are kept (G times its size) until the last use.

    Args:
        parameters: The parameters, by number.
        groups: The groups of the batch.
        collector: Where the gradients go.
        retain: Keep all until `settle`: several backward passes make one measurement.
        reduce: Averages rows over processes, in place; None for a single process.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        groups: Groups,
        collector: Collector,
        retain: bool,
        reduce: Callable[[Tensor], None] | None,
    ) -> None:
        self.groups = groups
        self.delivered: set[int] = set()
        self.uncovered: set[int] = set()
        self.released = False
        self._parameters = parameters
        self._collector = collector
        self._retain = retain
        self._reduce = reduce
        self._uses: Counter[int] = Counter()
        self._uncertain_uses: Counter[int] = Counter()
        self._deliveries: Counter[int] = Counter()
        self._kept: dict[int, Tensor] = {}
        self._closed: set[int] = set()
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def expect(self, params: Iterable[int], certain: bool) -> None:
        """Announces, in the forward pass, that the backward pass will deliver gradients of these parameters.

        Uses without gradients are uncertain: they come again under reentrant checkpointing, and never otherwise. They
        count for a parameter that has no others.
        """
        for index in params:
            (self._uses if certain else self._uncertain_uses)[index] += 1

    def takes_products(self, operand: Operand) -> bool:
        """Whether inner products may be delivered in place of gradients."""
        wanted = isinstance(self._collector, GramianCollector) and self._collector.takes_products
        return wanted and self._reduce is None and self._passes(operand)

    def deliver_products(self, operand: Operand, products: Tensor) -> None:
        """Takes inner products (G, G) of a parameter's group gradients; see `takes_products`."""
        (index,) = operand.params
        assert isinstance(self._collector, GramianCollector)
        self._collector.collect_products(index, products)
        self._close(index)

    def deliver(self, operand: Operand, pieces: Iterable[tuple[int, Tensor]]) -> Tensor:
        """Takes the group gradients of an operand.

        Args:
            operand: What they are gradients of.
            pieces: Start in the flattened operand, and rows (G, n). The pieces cover the operand in order. Rows may be
                overwritten once the next piece is asked for.

        Returns:
            Their sum over groups, in the shape and type of the operand: the gradient that training needs.
        """
        target = operand.tensor
        streams = self.released or self._passes(operand)
        total = kept = None
        for start, rows in pieces:
            rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
            if total is None:
                total = rows.new_empty(target.numel())
                kept = None if streams else rows.new_empty((len(rows), target.numel()))
            end = start + rows.shape[1]
            torch.sum(rows, 0, out=total[start:end])
            if kept is None:
                self._hand_over(operand.params[0], start, rows)
            else:
                kept[:, start:end] = rows
        assert total is not None
        if kept is None:
            self._close(operand.params[0])
        elif operand.leaf:
            self._keep(operand.params[0], kept)
        else:
            self._pull_back(operand, kept)
        return total.view(target.shape).to(target.dtype)

    def uncover_all(self) -> None:
        """Notes that samples could not be told apart somewhere: no split can be vouched for."""
        self.uncovered.update(range(len(self._parameters)))

    def release(self) -> None:
        """Ends the splitting: gradients of further backward passes go to nobody, at the cost of ordinary ones."""
        one = torch.zeros(self.groups.size, dtype=torch.long, device=self.groups.group.device)
        self.groups, self.released = Groups(one, 1), True
        self._collector, self._reduce, self._retain = _Nobody(), None, False
        self._kept.clear()

    def settle(self) -> None:
        """Passes on whatever is still kept."""
        for index in sorted(self._kept):
            self._flush(index)

    def workspace(self, numel: int, like: Tensor) -> Tensor:
        """Memory for ``numel`` numbers of the type of ``like``, reused by every piece."""
        key = (like.device, like.dtype)
        held = self._buffers.get(key)
        if held is None or held.numel() < numel:
            held = self._buffers[key] = like.new_empty(numel)
        return held[:numel]

    def _passes(self, operand: Operand) -> bool:
        """Whether these are the complete gradients of a parameter."""
        if not operand.leaf or self._retain:
            return False
        (index,) = operand.params
        return self._expected(index) == 1 and index not in self._kept

    def _expected(self, index: int) -> int:
        return self._uses[index] or self._uncertain_uses[index]

    def _hand_over(self, index: int, start: int, rows: Tensor) -> None:
        if self._reduce is not None:
            self._reduce(rows)
        self._collector.collect(index, start, rows)

    def _close(self, index: int) -> None:
        if index in self._closed:  # a second backward pass without `retain`: the products lack the cross terms
            self.uncovered.add(index)
        self._closed.add(index)
        self.delivered.add(index)

    def _keep(self, index: int, rows: Tensor) -> None:
        """Adds the gradients of one use, and passes them on after the last one."""
        if index in self._kept:
            self._kept[index] += rows
        else:
            self._kept[index] = rows
        self.delivered.add(index)
        self._deliveries[index] += 1
        if self._deliveries[index] >= self._expected(index) and not self._retain:
            self._flush(index)

    def _flush(self, index: int) -> None:
        rows = self._kept.pop(index)
        if index in self._closed:
            self.uncovered.add(index)
        self._closed.add(index)
        self._hand_over(index, 0, rows)

    def _pull_back(self, operand: Operand, rows: Tensor) -> None:
        """Turns group gradients of a computed tensor into those of its parameters."""
        parameters = [self._parameters[index] for index in operand.params]
        pulled = [rows.new_zeros((len(rows), parameter.numel())) for parameter in parameters]
        for group, row in enumerate(rows):
            cotangent = row.view(operand.tensor.shape).to(operand.tensor.dtype)
            parts = gradients_at(operand.tensor, parameters, cotangent)
            for into, part in zip(pulled, parts, strict=True):
                if part is not None:
                    into[group] = part.flatten()
        for index, into in zip(operand.params, pulled, strict=True):
            self._keep(index, into)
