"""Which tensors come from parameters alone, and which carry samples.

A parameter's gradient splits by group at the operator where it meets the batch. Everything computed from parameters,
buffers and constants before that point (a transposed weight, a normalised one, a table of position embeddings that was
looked up) is the same for all samples and stands for its parameters there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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

LOST = -1
"""Batch dimension of a tensor whose samples cannot be located."""
_MOVING = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint", "einsum", "__get__"}
"""Functions (and properties, such as ``x.T``) that may return a view with other dimensions in front."""
_PICKING = {"__getitem__", "index_select", "flip", "roll", "stack"}
"""Functions that may change the order of samples, or put something else in front of them."""


class Mark(NamedTuple):
    """What is known of a tensor. Tensors without a mark carry samples along dimension 0.

    Attributes:
        params: Numbers of the parameters it was computed from.
        constant: Whether it is the same for all samples.
        batch_dim: Where the samples are, if it is not constant; `LOST` if that is not known.
    """

    params: tuple[int, ...]
    constant: bool
    batch_dim: int = 0


class Provenance:
    """Marks of tensors, by identity. Holds no tensor alive.

    Args:
        trained: The parameters that are measured, by number.
        constants: Other parameters, and buffers.
        batch_size: B.
    """

    def __init__(self, trained: Iterable[nn.Parameter], constants: Iterable[Tensor], batch_size: int) -> None:
        self._marks: dict[int, tuple[weakref.ref[Tensor], Mark]] = {}
        self.batch_size = batch_size
        for tensor in constants:
            self.mark(tensor, Mark((), True))
        for index, parameter in enumerate(trained):
            self.mark(parameter, Mark((index,), True))

    def carries_samples(self, tensor: Tensor) -> bool:
        """Whether a tensor differs between samples: all that come from outside, and what is computed from them."""
        mark = self.of(tensor)
        if mark is not None:
            return not mark.constant
        return tensor.dim() > 0 and tensor.shape[0] > 0 and tensor.shape[0] % self.batch_size == 0

    def mark(self, tensor: Tensor, mark: Mark) -> None:
        """Marks a tensor."""
        self._marks[id(tensor)] = (weakref.ref(tensor), mark)

    def of(self, tensor: Tensor) -> Mark | None:
        """The mark of a tensor, or None."""
        entry = self._marks.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def mark_outputs(self, outputs: Any, mark: Mark) -> None:
        """Marks every tensor among an operator's outputs, parameters (changed in place) excepted."""
        for tensor in tensors_in((outputs,), {}):
            if not (tensor.is_leaf and tensor.requires_grad):
                self.mark(tensor, mark)

    def mark_constant(self, func: Any, inputs: list[Tensor], outputs: Any, params: set[int]) -> None:
        """Marks what is computed from parameters and constants, or made from nothing, as the same for all samples."""
        name = getattr(func, "__name__", "")
        drawn = name.startswith(("rand", "empty")) or name in ("normal", "bernoulli")
        if inputs or not drawn or name == "randperm":
            self.mark_outputs(outputs, Mark(tuple(sorted(params)), True))

    def follow_batch(self, func: Any, inputs: list[Tensor], args: tuple[Any, ...], outputs: Any) -> bool:
        """Keeps track of samples that are moved away from the front, as sequence-first layers do.

        Samples are taken to lie in front, m consecutive rows for each, until a function moves them; from then on they
        are followed, and where they cannot be, they count as lost.

        Returns:
            Whether this function has lost them.
        """
        name = getattr(func, "__name__", "")
        carriers = [tensor for tensor in inputs if self.carries_samples(tensor)]
        before = {self.batch_dim(tensor) for tensor in carriers}
        if before == {0} and keeps_samples(func, carriers, outputs):
            return False
        if name == "multi_head_attention_forward":
            carriers = carriers[:1]  # keys and values may be longer
        lost = False
        for output in tensors_in((outputs,), {}):
            places = {self._followed(name, args, tensor, output) for tensor in carriers}
            at = places.pop() if len(places) == 1 else LOST
            lost |= at == LOST
            if at != 0:
                self.mark(output, Mark((), False, at))
        return lost and LOST not in before

    def batch_dim(self, tensor: Tensor) -> int:
        """The dimension that runs over samples, or `LOST`."""
        mark = self.of(tensor)
        return 0 if mark is None else mark.batch_dim

    def _followed(self, name: str, args: tuple[Any, ...], source: Tensor, output: Tensor) -> int:
        """Where an input's samples are in an output."""
        at = self.batch_dim(source)
        if output.dim() == 0:
            return 0
        if at == LOST:
            return LOST
        if source is args[0] and _reorders(name, args, at):
            # Data may be put in any order before the model sees it, and a row of a table looked up for each sample.
            return 0 if not source.requires_grad and _picks_rows(args) and self.carries_samples(output) else LOST
        if name == "stack":
            dim = args[1] if len(args) > 1 else 0
            return at if dim > at else at + 1 if dim >= 0 else LOST
        if output.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            # A view: a dimension that is not taken apart keeps its size and its stride.
            identity = (source.shape[at], source.stride(at))
            places = [d for d in range(output.dim()) if (output.shape[d], output.stride(d)) == identity]
            if places:
                return at if at in places else places[0]
        elif name in ELEMENTWISE and output.dim() != source.dim():
            shifted = at + output.dim() - source.dim()  # dimensions are matched from the last one on
            return shifted if output.shape[shifted] == source.shape[at] else LOST
        # What lies before the samples is as it was; they may have been joined with what follows, or parted from it.
        if output.dim() <= at or output.shape[:at] != source.shape[:at]:
            return LOST
        reshaped = output.numel() == source.numel() or name == "repeat_interleave"
        kept = output.shape[at] == source.shape[at] or (reshaped and output.shape[at] % self.batch_size == 0)
        return at if kept else LOST


def keeps_samples(func: Any, inputs: list[Tensor], output: Any) -> bool:
    """Whether samples that were in front of all inputs are in front of the output, as after most functions."""
    name = getattr(func, "__name__", "")
    if not isinstance(output, Tensor):
        return name == "__get__"  # a shape, a type
    return name not in _MOVING and name not in _PICKING and all(t.dim() == 0 or _alike(t, output) for t in inputs)


def _alike(source: Tensor, output: Any) -> bool:
    """Whether an output has as many dimensions as an input and as many rows: nothing suggests that samples moved."""
    if not isinstance(output, Tensor) or output.dim() != source.dim():
        return False
    return output.dim() == 0 or output.shape[0] == source.shape[0]


def _picks_rows(args: tuple[Any, ...]) -> bool:
    """Whether rows are picked one by one, not by a mask, which leaves as many for a sample as it pleases."""
    return not any(tensor.dtype == torch.bool for tensor in tensors_in(args[1:], {}))


def _reorders(name: str, args: tuple[Any, ...], at: int) -> bool:
    """Whether samples are picked or permuted along their dimension."""
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return len(index) > at and isinstance(index[at], Tensor | list)
    if name == "index_select":
        return at in args[1:2]
    if name in ("flip", "roll"):
        return at in {dim for value in args[1:] for dim in (value if isinstance(value, list | tuple) else (value,))}
    return False


def tensors_in(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors among an operator's arguments, those in lists and tuples included."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(tensors_in(value, {}))
    return found
