"""The point where an operator's output gradient is seen: an identity that splits parameter gradients by group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.gradients.ledger import Ledger, Operand


class Operation(Protocol):
    """What one call of an operator needs to split its parameters' gradients by group.

    Attributes:
        operands: What the gradients are of.
        saved: Tensors of the forward pass that are needed, usually the operator's input.
    """

    operands: tuple[Operand, ...]
    saved: tuple[Tensor, ...]

    def split(self, ledger: Ledger, saved: Sequence[Tensor], grad: Tensor) -> Sequence[Tensor | None]:
        """Delivers the operands' group gradients to the ledger.

        Args:
            ledger: Where they go.
            saved: The saved tensors.
            grad: Gradient of the operator's output, in its shape.

        Returns:
            For each operand the gradient that training needs, or None where autograd computes it anyway.
        """


class Tap(torch.autograd.Function):
    """Identity on an operator's output.

    The operator runs on detached parameters, so that autograd computes the gradient of its input as ever and none of
    its parameters; these are computed here, group by group, in the same arithmetic, and added up.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, operation: Operation, ledger: Ledger, *tensors: Tensor) -> Tensor:  # noqa: ARG004
        """``tensors`` are the operation's saved ones, then its operands: the edges of the graph."""
        ctx.save_for_backward(*operation.saved)
        ctx.operation, ctx.ledger = operation, ledger
        # Held by the context through save_for_backward, where checkpointing can drop them.
        operation.saved = ()
        return output.detach()  # not the output itself: as a view of it, it could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Passes the gradient on, and splits the operands' gradients."""
        saved = ctx.saved_tensors  # under checkpointing this runs the forward pass again, which the recorder must see
        if ctx.ledger.released and not ctx.operation.operands:  # autograd computes their gradients by itself
            return grad, None, None, *(None for _ in saved)
        with torch._C.DisableTorchFunction():
            totals = ctx.operation.split(ctx.ledger, saved, grad)
        return grad, None, None, *(None for _ in saved), *totals


class Expand(torch.autograd.Function):
    """Repeats an operand for every sample, so that autograd returns its gradient sample by sample."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, operand: Operand, ledger: Ledger, rows: int, dims: int) -> Tensor:
        """Result (rows, ...) of ``dims`` dimensions, broadcast over the first."""
        ctx.operand, ctx.ledger = operand, ledger
        ctx.aligned = tensor.dim() == dims and tensor.shape[0] == rows and rows > 1
        if ctx.aligned:
            return tensor.detach().view_as(tensor)
        trailing = tensor.shape[1:] if tensor.dim() == dims else (1,) * (dims - 1 - tensor.dim()) + tensor.shape
        return tensor.detach().reshape(1, *trailing).expand(rows, *trailing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Sums the samples' gradients within each group."""
        groups = ctx.ledger.groups
        with torch._C.DisableTorchFunction():
            if ctx.aligned:  # each row is one sample's already
                per_sample = grad.reshape(groups.size, -1)
                rows = groups.members(grad.dtype)[:, :, None] * per_sample
                total = ctx.ledger.deliver(ctx.operand, [(0, rows.flatten(1))])
            else:
                rows = groups.sum(grad.reshape(grad.shape[0], -1))
                total = ctx.ledger.deliver(ctx.operand, [(0, rows)])
        return total, None, None, None, None


class Unseen(torch.autograd.Function):
    """Identity on a tensor that is not split: a gradient that comes back through it makes parameters uncovered."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, params: Iterable[int], ledger: Ledger) -> Tensor:
        """The tensor."""
        ctx.params, ctx.ledger = params, ledger
        return tensor.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Notes the parameters."""
        ctx.ledger.uncovered.update(ctx.params)
        return grad, None, None
