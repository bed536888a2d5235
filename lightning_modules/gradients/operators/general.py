"""Every other operator: elementwise ones exactly and cheaply, unknown ones exactly and slowly, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_modules.gradients.ledger import Ledger, Operand
from lightning_modules.gradients.provenance import LOST, tensors_in
from lightning_modules.gradients.tap import Expand

if TYPE_CHECKING:
    from lightning_modules.gradients.recorder import GramianRecorder

ELEMENTWISE = {
    f"{prefix}{name}{suffix}"
    for name in ("add", "sub", "mul", "div", "truediv", "pow")
    for prefix, suffix in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
} | {
    "true_divide",
    "subtract",
    "multiply",
    "divide",
    "rsub",
    "maximum",
    "minimum",
    "lerp",
    "addcmul",
    "addcdiv",
    "where",
}
"""Names of operators that broadcast, whose every output number comes from one number of each input."""

_MIXING = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
"""Operators whose layout of the batch cannot be told from the output."""


def elementwise(recorder: GramianRecorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Repeats operands for every sample before the operator: autograd then returns their gradients per sample."""
    tensors = tensors_in(args, kwargs)
    if any(recorder.batch_dim(tensor) for tensor in tensors):
        return NotImplemented
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    if not shape or shape[0] % recorder.groups.size:
        return NotImplemented

    def expand(tensor: Tensor) -> Tensor:
        operand = recorder.operand(tensor)
        if operand is None:
            return tensor
        recorder.expect(operand.params)
        repeated = Expand.apply(tensor, operand, recorder.ledger, shape[0], len(shape))
        if tensor.dim():
            return repeated
        # A single number does not raise the precision of what it is combined with, a tensor would.
        others = [other for other in tensors if other.dim()]
        return repeated.to(torch.result_type(tensor, others[0]))

    return func(*_replaced(args, expand), **{key: _replaced((value,), expand)[0] for key, value in kwargs.items()})


class GeneralOperation:
    """Splits gradients by one small backward pass per group through the operator alone.

    Args:
        output: The operator's output, with its graph.
        leaves: What stands for the operands in that graph.
        operands: The operands.
        inputs: Inputs that carry samples and take part in the graph.
        batch_dim: Dimension of the output that runs over samples.
    """

    def __init__(
        self,
        output: Tensor,
        leaves: Sequence[Tensor],
        operands: Sequence[Operand],
        inputs: Sequence[Tensor],
        batch_dim: int,
    ) -> None:
        self.output, self.leaves, self.inputs = output, list(leaves), list(inputs)
        self._owners = tuple(operands)
        self.operands: tuple[Operand, ...] = ()  # autograd computes the sums anyway
        self.saved: tuple[Tensor, ...] = ()
        self.batch_dim = batch_dim

    def split(self, ledger: Ledger, saved: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
        """See `Operation.split`. Operands stay uncovered where the operator turns out to mix samples."""
        groups = ledger.groups
        members = groups.members(grad.dtype).repeat_interleave(grad.shape[self.batch_dim] // groups.size, dim=1)
        rows = [grad.new_zeros((groups.num_groups, leaf.numel())) for leaf in self.leaves]
        for index, _ in groups.slices():
            shape = [1] * grad.dim()
            shape[self.batch_dim] = -1
            own = members[index].view(shape)
            parts = torch.autograd.grad(
                self.output, [*self.leaves, *self.inputs], grad * own, retain_graph=True, allow_unused=True
            )
            for into, part in zip(rows, parts, strict=False):
                if part is not None:
                    into[index] = part.flatten()
            if not self._stays_inside(parts[len(self.leaves) :], members[index]):
                ledger.uncovered.update(i for operand in self._owners for i in operand.params)
                return []
        for operand, part in zip(self._owners, rows, strict=True):
            ledger.deliver(operand, [(0, part)])
        return []

    def _stays_inside(self, parts: Sequence[Tensor | None], own: Tensor) -> bool:
        """Whether a group's outputs depend on no other group's inputs."""
        for part in parts:
            if part is None or part.shape[self.batch_dim] != len(own):
                continue
            outside = part.movedim(self.batch_dim, 0)[own == 0]
            if outside.count_nonzero():
                return False
        return True


def general(recorder: GramianRecorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs any operator; its operands are split the slow way, or reported as uncovered where that is impossible."""
    leaves: dict[int, Tensor] = {}
    operands: dict[int, Operand] = {}

    def alias(tensor: Tensor) -> Tensor:
        operand = recorder.operand(tensor)
        if operand is None:
            return tensor
        operands[id(tensor)] = operand
        return leaves.setdefault(id(tensor), tensor.view_as(tensor))

    tensors = tensors_in(args, kwargs)
    result = func(*_replaced(args, alias), **{key: _replaced((value,), alias)[0] for key, value in kwargs.items()})
    packed = isinstance(result, tuple)
    output = result[0] if packed and result else result
    moved = {at for tensor in tensors if (at := recorder.batch_dim(tensor))}
    at = moved.pop() if len(moved) == 1 else LOST if moved else 0
    if getattr(func, "__name__", "") == "multi_head_attention_forward":
        at = 1 if args[0].dim() == 3 and at in (0, 1) else LOST
    if not _separable(recorder, func, output, at) or (
        packed and any(t.requires_grad for t in tensors_in(result[1:], {}))
    ):
        recorder.ledger.uncovered.update(index for operand in operands.values() for index in operand.params)
        return result
    inputs = [tensor for tensor in tensors if id(tensor) not in leaves and tensor.requires_grad]
    operation = GeneralOperation(output, list(leaves.values()), list(operands.values()), inputs, at)
    tapped = recorder.tap(output, operation)
    recorder.expect(index for operand in operands.values() for index in operand.params)
    return (tapped, *result[1:]) if packed else tapped


def _separable(recorder: GramianRecorder, func: Any, output: Any, at: int) -> bool:
    if not isinstance(output, Tensor) or getattr(func, "__name__", "") in _MIXING or not output.requires_grad:
        return False
    return 0 <= at < output.dim() and output.shape[at] > 0 and output.shape[at] % recorder.groups.size == 0


def _replaced(values: Any, replace: Any) -> tuple[Any, ...]:
    """The same arguments with every tensor replaced, those in lists and tuples included."""
    return tuple(
        replace(value)
        if isinstance(value, Tensor)
        else type(value)(_replaced(value, replace))
        if isinstance(value, list | tuple) and type(value) in (list, tuple)
        else value
        for value in values
    )
