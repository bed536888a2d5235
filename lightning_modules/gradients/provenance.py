"""Which tensors come from parameters alone, and which carry samples.

A parameter's gradient splits by group at the operator where it meets the batch. Everything computed from parameters,
buffers and constants before that point (a transposed weight, a normalised one, a table of position embeddings that was
looked up) is the same for all samples and stands for its parameters there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

_MOVING = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint", "einsum", "__get__"}
"""Functions (and properties, such as ``x.T``) that may return a view with other dimensions in front."""
_STACKING = {"cat", "concat", "concatenate", "stack", "vstack", "repeat", "tile"}
"""Functions that may put several batches one after the other along dimension 0."""
LOST = -1
"""Batch dimension of a tensor whose samples cannot be located."""


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
    """Marks of tensors, by identity. Holds no tensor alive."""

    def __init__(self, parameters: Iterable[nn.Parameter], buffers: Iterable[Tensor]) -> None:
        self._marks: dict[int, tuple[weakref.ref[Tensor], Mark]] = {}
        for index, parameter in enumerate(parameters):
            self.mark(parameter, Mark((index,), True))
        for buffer in buffers:
            self.mark(buffer, Mark((), True))

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

    def follow_batch(self, func: Any, inputs: list[Tensor], outputs: Any) -> None:
        """Keeps track of samples that are moved away from the front, as sequence-first layers do.

        Samples are taken to lie in front, m consecutive rows for each, until a function moves them; from then on they
        are followed, and where they cannot be, they count as lost.
        """
        name = getattr(func, "__name__", "")
        moved = [(tensor, at) for tensor in inputs if (at := self._moved_to(tensor)) != 0]
        if not moved and name not in _MOVING and name not in _STACKING:
            return
        for output in tensors_in((outputs,), {}):
            if name in _STACKING:
                at = _stacked(inputs, output) if not moved else LOST
            elif moved:
                places = {_followed(tensor, at, output) for tensor, at in moved}
                at = places.pop() if len(places) == 1 else LOST
            else:
                at = _followed(inputs[0], 0, output)
            if at != 0:
                self.mark(output, Mark((), False, at))

    def _moved_to(self, tensor: Tensor) -> int:
        mark = self.of(tensor)
        return 0 if mark is None else mark.batch_dim


def _followed(source: Tensor, at: int, output: Tensor) -> int:
    """Where the samples, along dimension ``at`` of an input, are in an output."""
    if at == LOST or output.dim() == 0:
        return LOST if output.dim() else 0
    if output.shape == source.shape and output.stride() == source.stride():
        return at
    if output.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
        # A view: a dimension that is not taken apart keeps its size and its stride.
        identity = (source.shape[at], source.stride(at))
        places = [d for d in range(output.dim()) if (output.shape[d], output.stride(d)) == identity]
        if places:
            return at if at in places else places[0]
    # What lies before the samples is as it was, and they may have been joined with what follows them.
    rows = output.shape[at] if output.dim() > at else 1
    return at if output.shape[:at] == source.shape[:at] and rows % source.shape[at] == 0 else LOST


def _stacked(inputs: list[Tensor], output: Tensor) -> int:
    """Where the samples are after tensors with samples in front were joined or repeated."""
    alike = [tensor for tensor in inputs if tensor.dim() == output.dim()]
    if not alike:  # stacked along a new dimension
        if output.shape[0] == inputs[0].shape[0]:
            return LOST if len(inputs) == output.shape[0] else 0  # lost: it could be either
        return 1
    return 0 if output.shape[0] in {tensor.shape[0] for tensor in alike} else LOST


def tensors_in(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors among an operator's arguments, those in lists and tuples included."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(tensors_in(value, {}))
    return found
