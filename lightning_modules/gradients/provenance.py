"""Which tensors come from parameters alone, and which carry samples.

A parameter's gradient splits by group at the operator where it meets the batch. Everything computed from parameters,
buffers and constants before that point (a transposed weight, a normalised one, a table of position embeddings that was
looked up) is the same for all samples and stands for its parameters there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_modules.gradients.layout import LOST, Call, keeps_samples, position, tensors_in


class Mark(NamedTuple):
    """What is known of a tensor. Tensors without a mark carry samples along dimension 0.

    Attributes:
        params: Numbers of the parameters it was computed from.
        constant: Whether it is the same for all samples.
        batch_dim: Where the samples are, if it is not constant; `LOST` if that is not known.
        pooled: Whether it is a number computed from all samples, such as a mean loss.
    """

    params: tuple[int, ...]
    constant: bool
    batch_dim: int = 0
    pooled: bool = False


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
            pooled = any(self.is_pooled(tensor) for tensor in inputs)
            self.mark_outputs(outputs, Mark(tuple(sorted(params)), True, pooled=pooled))

    def follow_batch(self, call: Call, inputs: list[Tensor], outputs: Any) -> bool:
        """Keeps track of samples that are moved away from the front, as sequence-first layers do; see `layout`.

        Returns:
            Whether this call has lost them.
        """
        carriers = [tensor for tensor in inputs if self.carries_samples(tensor)]
        before = {self.batch_dim(tensor) for tensor in carriers}
        mixes = any(tensor.requires_grad and self.is_pooled(tensor) for tensor in inputs)
        if before == {0} and not mixes and keeps_samples(call.name, carriers, outputs):
            return False
        if call.name == "multi_head_attention_forward":
            carriers = carriers[:1]  # keys and values may be longer
        lost = False
        for output in tensors_in((outputs,), {}):
            if output.dim() == 0:
                self.mark(output, Mark((), True, pooled=True))
                continue
            places = {position(call, t, self.batch_dim(t), output, self.batch_size) for t in carriers}
            at = places.pop() if len(places) == 1 and not mixes else LOST
            lost |= at == LOST
            if at != 0:
                self.mark(output, Mark((), False, at))
        return lost and LOST not in before

    def is_pooled(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is a number computed from all samples."""
        mark = self.of(tensor)
        return mark is not None and mark.pooled

    def batch_dim(self, tensor: Tensor) -> int:
        """The dimension that runs over samples, or `LOST`."""
        mark = self.of(tensor)
        return 0 if mark is None else mark.batch_dim
