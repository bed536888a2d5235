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

_TRANSPOSITIONS = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"}


class Mark(NamedTuple):
    """What is known of a tensor. Tensors without a mark carry samples along dimension 0.

    Attributes:
        params: Numbers of the parameters it was computed from.
        constant: Whether it is the same for all samples.
        batch_dim: Where the samples are, if it is not constant.
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
        """Marks every tensor among an operator's outputs."""
        for tensor in tensors_in((outputs,), {}):
            self.mark(tensor, mark)

    def follow_batch(self, func: Any, inputs: list[Tensor], output: Any) -> None:
        """Keeps track of a batch dimension that is moved away from the front, as sequence-first layers do.

        Only moves and operators that keep the shape are followed: after any other, samples are taken to be in front
        again, which is where reshapes leave them in practice.
        """
        if not isinstance(output, Tensor) or not inputs:
            return
        source = inputs[0]
        mark = self.of(source)
        at = 0 if mark is None else mark.batch_dim
        if getattr(func, "__name__", "") in _TRANSPOSITIONS:
            at = _moved(source, output, at)
        elif mark is None or output.shape != source.shape:
            return
        if at != 0:
            self.mark(output, Mark((), False, at))


def _moved(source: Tensor, output: Tensor, at: int) -> int:
    """Where dimension ``at`` of a tensor lies in a transposed view: a dimension keeps its size and its stride."""
    identity = (source.shape[at], source.stride(at))
    candidates = [d for d in range(output.dim()) if (output.shape[d], output.stride(d)) == identity]
    return at if at in candidates or not candidates else candidates[0]


def tensors_in(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors among an operator's arguments, those in lists and tuples included."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(tensors_in(value, {}))
    return found
