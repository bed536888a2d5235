"""Embedding tables: a row's gradient is the sum of the output gradients where it was looked up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_modules.gradients.ledger import WORKSPACE_BYTES, Ledger, Operand

if TYPE_CHECKING:
    from lightning_modules.gradients.recorder import GramianRecorder


class EmbeddingOperation:
    """Splits the gradient of a table (V, D).

    Args:
        indices: Rows that were looked up (rows, ...).
        table: The table.
        padding: Row without a gradient, or -1.
    """

    def __init__(self, indices: Tensor, table: Operand, padding: int) -> None:
        self.table = table
        self.operands: tuple[Operand, ...] = (table,)
        self.saved: tuple[Tensor, ...] = (indices,)
        self.padding = padding

    def split(self, ledger: Ledger, saved: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
        """See `Operation.split`."""
        rows, width = self.table.tensor.shape
        return [ledger.deliver(self.table, self._pieces(ledger, saved[0], grad, rows, width))]

    def _pieces(
        self, ledger: Ledger, indices: Tensor, grad: Tensor, rows: int, width: int
    ) -> Iterator[tuple[int, Tensor]]:
        groups = ledger.groups
        index = indices.reshape(groups.size, -1)
        group = groups.group[:, None].expand_as(index).flatten()
        index, grad = index.flatten(), grad.reshape(-1, width)
        kept = index != self.padding
        index, group, grad = index[kept], group[kept], grad[kept]
        step = min(rows, max(1, WORKSPACE_BYTES // (grad.element_size() * groups.num_groups * width)))
        for start in range(0, rows, step):
            count = min(step, rows - start)
            out = ledger.workspace(groups.num_groups * count * width, grad).view(-1, width).zero_()
            inside = (index >= start) & (index < start + count)
            out.index_add_(0, (group * count + index - start)[inside], grad[inside])
            yield start * width, out.view(groups.num_groups, -1)


def embedding(
    recorder: GramianRecorder,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001  (matters only with max_norm)
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """``torch.nn.functional.embedding``."""
    operand = recorder.operand(weight)
    special = max_norm is not None or scale_grad_by_freq or sparse
    if operand is None or special or not recorder.carries_samples(input) or recorder.batch_dim(input):
        return NotImplemented
    padding = -1 if padding_idx is None else padding_idx % len(weight)
    output = func(input, weight.detach(), padding_idx)
    return recorder.tap(output, EmbeddingOperation(input, operand, padding))
