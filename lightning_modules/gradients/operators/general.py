"""Every other operator: elementwise ones exactly and cheaply, unknown ones exactly and slowly, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_modules.gradients.backward import gradients_at
from lightning_modules.gradients.layout import LOST, tensors_in
from lightning_modules.gradients.ledger import Ledger, Operand
from lightning_modules.gradients.tap import Expand, Unseen

if TYPE_CHECKING:
    from lightning_modules.gradients.recorder import GramianRecorder

_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
"""Operators that say by their last argument whether samples come first."""


def elementwise(recorder: GramianRecorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Repeats operands for every sample before the operator: autograd then returns their gradients per sample."""
    tensors = tensors_in(args, kwargs)
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    for tensor in tensors:
        aligned = tensor.dim() == len(shape) and tensor.shape[:1] == shape[:1] and recorder.batch_dim(tensor) == 0
        if recorder.carries_samples(tensor) and not aligned:
            return NotImplemented
    if _is_in_place(func) and recorder.operand(tensors[0]) is not None:
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
            parts = gradients_at(self.output, [*self.leaves, *self.inputs], grad * own)
            for into, part in zip(rows, parts, strict=False):
                if part is not None:
                    into[index] = part.flatten()
            if not self._stays_inside(parts[len(self.leaves) :], members[index]):
                ledger.uncover_all()  # samples mix, so what arrives before this operator belongs to no one sample
                return []
        for operand, part in zip(self._owners, rows, strict=True):
            ledger.deliver(operand, [(0, part)])
        return []

    def _stays_inside(self, parts: Sequence[Tensor | None], own: Tensor) -> bool:
        """Whether a group's outputs depend on no other group's inputs."""
        for part in parts:
            if part is None:
                continue
            if part.dim() <= self.batch_dim or len(own) % part.shape[self.batch_dim]:
                return False
            mine = own.view(part.shape[self.batch_dim], -1).amax(1)
            if part.movedim(self.batch_dim, 0)[mine == 0].count_nonzero():
                return False
        return True


def general(recorder: GramianRecorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs any operator; its operands are split the slow way, or reported as uncovered where that is impossible."""
    tensors = tensors_in(args, kwargs)
    owners = {id(tensor): operand for tensor in tensors if (operand := recorder.operand(tensor)) is not None}
    params = {index for operand in owners.values() for index in operand.params}
    at = _batch_dim(recorder, func, args, tensors)
    if at == LOST or (_is_in_place(func) and id(args[0]) in owners):
        return recorder.lose(func(*args, **kwargs), params)
    stand_ins = {id(t): _stand_in(t, id(t) in owners, not recorder.carries_samples(t)) for t in tensors}

    def replace(tensor: Tensor) -> Tensor:
        return stand_ins[id(tensor)]

    result = func(*_replaced(args, replace), **{key: _replaced((value,), replace)[0] for key, value in kwargs.items()})
    output, others = (result[0], result[1:]) if isinstance(result, tuple) and result else (result, ())
    if not isinstance(output, Tensor) or output.dim() <= at or output.shape[at] % recorder.groups.size:
        return recorder.lose(result, params)
    inputs = [stand_ins[id(t)] for t in tensors if id(t) not in owners and stand_ins[id(t)].requires_grad]
    leaves = [stand_ins[key] for key in owners]
    tapped = recorder.tap(output, GeneralOperation(output, leaves, list(owners.values()), inputs, at))
    recorder.expect(params)
    if not isinstance(result, tuple):
        return tapped
    hidden = (
        Unseen.apply(o, params, recorder.ledger) if isinstance(o, Tensor) and o.requires_grad else o for o in others
    )
    return (tapped, *hidden)


def _batch_dim(recorder: GramianRecorder, func: Any, args: tuple[Any, ...], tensors: Sequence[Tensor]) -> int:
    """Where the output's samples should be: where the inputs' are."""
    carriers = [tensor for tensor in tensors if recorder.carries_samples(tensor)]
    places = {recorder.batch_dim(tensor) for tensor in carriers}
    at = places.pop() if len(places) == 1 else LOST
    if func.__name__ == "multi_head_attention_forward" and carriers[0].dim() == 3 and at != 1:
        return LOST  # it takes sequences first, but the samples are not second
    if func.__name__ in _RECURRENT:
        packed, batch_first = isinstance(args[1], Tensor) and args[1].dim() == 1, args[-1]
        return LOST if packed or at != (0 if batch_first else 1) else at
    return at


def _stand_in(tensor: Tensor, is_operand: bool, is_constant: bool) -> Tensor:
    """What an operator gets in place of a tensor, so that gradients can be taken at this operator alone."""
    if is_operand or (tensor.requires_grad and tensor.is_leaf):
        return tensor.view_as(tensor)
    if tensor.is_floating_point() and not tensor.requires_grad and not is_constant:
        return tensor.detach().requires_grad_()  # to see whether samples stay apart
    return tensor


def _is_in_place(func: Any) -> bool:
    """Whether an operator changes its first argument."""
    name = func.__name__
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


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
