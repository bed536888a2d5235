"""Linear layers and products with a weight matrix: its gradient is the sum over rows of (output gradient)(input)'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_modules.gradients.groups import grouped_products
from lightning_modules.gradients.ledger import WORKSPACE_BYTES, Ledger, Operand

if TYPE_CHECKING:
    from lightning_modules.gradients.recorder import GramianRecorder


class LinearOperation:
    """Splits the gradients of weight (p, d), or (d, p) if ``transposed``, and bias (p,).

    Args:
        x: Input (..., d).
        weight: None if it is not trained.
        bias: None if there is none or it is not trained.
        transposed: Whether the weight is (d, p), as in ``x @ weight``.
        batch_dim: Dimension of input and output that runs over samples.
    """

    def __init__(
        self, x: Tensor, weight: Operand | None, bias: Operand | None, transposed: bool = False, batch_dim: int = 0
    ) -> None:
        self.weight, self.bias = weight, bias
        self.operands = tuple(operand for operand in (weight, bias) if operand is not None)
        self.saved: tuple[Tensor, ...] = () if weight is None else (x,)
        self.transposed = transposed
        self.batch_dim = batch_dim

    def split(self, ledger: Ledger, saved: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
        """See `Operation.split`."""
        if self.batch_dim:
            grad = grad.movedim(self.batch_dim, 0)
        totals: list[Tensor | None] = []
        if self.weight is not None:
            x = saved[0].movedim(self.batch_dim, 0) if self.batch_dim else saved[0]
            totals.append(split_weight(ledger, self.weight, grad, x, self.transposed))
        if self.bias is not None:
            totals.append(ledger.deliver(self.bias, [(0, ledger.groups.sum(grad.reshape(-1, grad.shape[-1])))]))
        return totals


def split_weight(ledger: Ledger, weight: Operand, grad: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """Delivers the group gradients of a weight matrix and returns their sum.

    Args:
        ledger: Where they go.
        weight: (p, d) up to reshaping, or (d, p) if ``transposed``.
        grad: Gradient of the output (rows, ..., p), samples in front.
        x: Input (rows, ..., d).
        transposed: See ``weight``.
    """
    groups = ledger.groups
    left = grad.reshape(groups.size, -1, grad.shape[-1])
    right = x.reshape(groups.size, -1, x.shape[-1]).to(left.dtype)
    if transposed:
        left, right = right, left
    if left.shape[1] == 1 and ledger.takes_products(weight) and _products_are_cheaper(groups.num_groups, left, right):
        return _split_by_samples(ledger, weight, left.squeeze(1), right.squeeze(1))
    return ledger.deliver(weight, _pieces(ledger, groups.arrange(left), groups.arrange(right)))


def _pieces(ledger: Ledger, left: Tensor, right: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The weight's group gradients (G, p, d), some of the p rows at a time."""
    num_groups, p, d = ledger.groups.num_groups, left.shape[-1], right.shape[-1]
    step = min(p, max(1, WORKSPACE_BYTES // (left.element_size() * num_groups * d)))
    for start in range(0, p, step):
        part = left[..., start : start + step]
        out = ledger.workspace(num_groups * part.shape[-1] * d, left).view(num_groups, part.shape[-1], d)
        yield start * d, grouped_products(ledger.groups, part, right, out).flatten(1)


def _products_are_cheaper(num_groups: int, left: Tensor, right: Tensor) -> bool:
    """Compares multiplications: between all samples, or between the gradients of all groups."""
    samples, p, d = len(left), left.shape[-1], right.shape[-1]
    return samples**2 * (p + d) < num_groups**2 * p * d


def _split_by_samples(ledger: Ledger, weight: Operand, left: Tensor, right: Tensor) -> Tensor:
    """With one row per sample, <g_i, g_j> = <left_i, left_j> <right_i, right_j>: no group gradient is needed.

    Goodfellow, "Efficient per-example gradient computations" (arXiv 1510.01799), for i = j.
    """
    full = [side.float() if side.element_size() < 4 else side for side in (left, right)]
    members = ledger.groups.members(full[0].dtype)
    products = (full[0] @ full[0].T) * (full[1] @ full[1].T)
    ledger.deliver_products(weight, members @ products @ members.T)
    return (left.T @ right).view(weight.tensor.shape).to(weight.tensor.dtype)


def linear(recorder: GramianRecorder, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``torch.nn.functional.linear``."""
    batch_dim = recorder.batch_dim(input)
    splits = 0 <= batch_dim < input.dim() - 1
    if not splits or not recorder.carries_samples(input) or recorder.is_foreign(weight, bias):
        return NotImplemented
    x = recorder.autocast(input)
    operation = LinearOperation(x, recorder.operand(weight), recorder.operand(bias), batch_dim=batch_dim)
    return recorder.tap(func(x, weight.detach(), None if bias is None else bias.detach()), operation)


def matmul(recorder: GramianRecorder, func: Any, input: Tensor, other: Tensor) -> Any:
    """``input @ weight``."""
    operand = recorder.operand(other)
    batch_dim = recorder.batch_dim(input)
    splits = 0 <= batch_dim < input.dim() - 1 and other.dim() == 2
    if not splits or operand is None or not recorder.carries_samples(input):
        return NotImplemented
    x = recorder.autocast(input)
    operation = LinearOperation(x, operand, None, transposed=True, batch_dim=batch_dim)
    return recorder.tap(func(x, other.detach()), operation)


def addmm(
    recorder: GramianRecorder,
    func: Any,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Any:
    """``bias + x @ weight``."""
    simple = input.dim() == 1 and beta == 1 and alpha == 1 and not recorder.is_foreign(input, mat2)
    if not simple or not recorder.carries_samples(mat1) or recorder.batch_dim(mat1):
        return NotImplemented
    x = recorder.autocast(mat1)
    operation = LinearOperation(x, recorder.operand(mat2), recorder.operand(input), transposed=True)
    return recorder.tap(func(input.detach(), x, mat2.detach()), operation)
