"""Where a function puts the samples of a batch.

Samples lie along one dimension of a tensor, m consecutive rows for each. Most functions leave them there; these rules
follow those that do not, and give up (`LOST`) where samples are put in another order, mixed, or cannot be located.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ELEMENTWISE = {
    f"{prefix}{name}{suffix}"
    for name in ("add", "sub", "mul", "div", "truediv", "pow")
    for prefix, suffix in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
} | {"true_divide", "subtract", "multiply", "divide", "rsub", "maximum", "minimum", "lerp", "addcmul", "addcdiv"}
ELEMENTWISE.add("where")
"""Names of operators that broadcast, whose every output number comes from one number of each input."""

LOST = -1
"""Batch dimension of a tensor whose samples cannot be located."""
_MOVING = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint", "__get__", "stack"}
"""Functions (and properties, such as ``x.T``) that may put other dimensions in front."""
_PRODUCTS = {"matmul", "mm", "__matmul__", "__rmatmul__", "einsum", "embedding", "scaled_dot_product_attention"}
_ACROSS: dict[str, tuple[int, int | None]] = {
    "flip": (1, None),
    "roll": (2, None),
    "index_select": (1, None),
    "gather": (1, None),
    "take_along_dim": (2, None),
    "softmax": (1, None),
    "log_softmax": (1, None),
    "softmin": (1, None),
    "cumsum": (1, None),
    "cumprod": (1, None),
    "cummax": (1, None),
    "cummin": (1, None),
    "logcumsumexp": (1, None),
    "sort": (1, -1),
    "argsort": (1, -1),
    "normalize": (2, 1),
    **{f"{prefix}{name}": (2, -1) for prefix in ("", "fft_") for name in ("fft", "ifft", "rfft", "irfft", "hfft")},
    **{
        f"{name}{suffix}": (1, None)
        for name in ("index_add", "index_copy", "index_fill", "scatter", "scatter_add", "scatter_reduce")
        for suffix in ("", "_")
    },
}
"""Functions along a dimension that keep the shape: the position of the argument that names it, and its default."""
_ANYWHERE = {"__getitem__", "take", "cdist", "flipud", "rot90", "index_put", "index_put_", "masked_select"}
_SUSPECT = _MOVING | _PRODUCTS | _ACROSS.keys() | _ANYWHERE


class Call(NamedTuple):
    """A call of a function."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument, by position or by one of its names."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    def first(self) -> Any:
        """What the function is mainly applied to."""
        return self.argument(0, "input", "self", "tensors", "query")


def keeps_samples(name: str, inputs: list[Tensor], output: Any) -> bool:
    """Whether samples that were in front of all inputs are in front of the output, as after most functions."""
    if not isinstance(output, Tensor):
        return name == "__get__"  # a shape, a type
    return name not in _SUSPECT and all(t.dim() == 0 or _alike(t, output) for t in inputs)


def _alike(source: Tensor, output: Tensor) -> bool:
    """Whether an output has as many dimensions as an input and as many rows: nothing suggests that samples moved."""
    return output.dim() == source.dim() and (output.dim() == 0 or output.shape[0] == source.shape[0])


def position(call: Call, source: Tensor, at: int, output: Tensor, batch_size: int) -> int:
    """Where samples along dimension ``at`` of one input are in an output with at least one dimension.

    Args:
        call: The call.
        source: The input.
        at: Its batch dimension.
        output: The output.
        batch_size: B.
    """
    if at == LOST or (call.name in _PRODUCTS and _contracts(call, source, at)):
        return LOST
    written = call.name.startswith(("index_", "scatter"))  # into something else, by position
    if (source is call.first() or written) and _goes_across(call, source, at):
        # Data may be put in any order before the model sees it, and a row of a table looked up for each sample.
        by_mask = any(index.dtype == torch.bool for index in tensors_in(call.args[1:], {}))
        return 0 if not source.requires_grad and not by_mask and output.shape[0] % batch_size == 0 else LOST
    if call.name == "stack":
        dim = call.argument(1, "dim", default=0) % output.dim()
        return at if dim > at else at + 1
    if call.name == "einsum":
        return _in_equation(call, source, at)
    if output.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
        # A view: a dimension that is not taken apart keeps its size and its stride.
        identity = (source.shape[at], source.stride(at))
        places = [d for d in range(output.dim()) if (output.shape[d], output.stride(d)) == identity]
        if places:
            return at if at in places else places[0]
    elif call.name in ELEMENTWISE and output.dim() != source.dim():
        shifted = at + output.dim() - source.dim()  # dimensions are matched from the last one on
        return shifted if output.shape[shifted] == source.shape[at] else LOST
    # What lies before the samples is as it was; they may have been joined with what follows, or parted from it.
    if output.dim() <= at or output.shape[:at] != source.shape[:at]:
        return LOST
    reshaped = output.numel() == source.numel() or call.name == "repeat_interleave"
    kept = output.shape[at] == source.shape[at] or (reshaped and output.shape[at] % batch_size == 0)
    return at if kept else LOST


def _goes_across(call: Call, source: Tensor, at: int) -> bool:
    """Whether a function picks, permutes or combines along the dimension of the samples."""
    if call.name == "__getitem__":
        index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
        return len(index) > at and isinstance(index[at], Tensor | list | np.ndarray)
    if call.name not in _ACROSS:
        return call.name in _ANYWHERE
    where, default = _ACROSS[call.name]
    dims = call.argument(where, "dim", "dims", "axis", default=default)
    if call.name == "flip" and isinstance(dims, int):
        dims = call.args[1:] or dims
    if dims is None:
        return True
    return at in {dim % source.dim() for dim in (dims if isinstance(dims, list | tuple) else (dims,))}


def _contracts(call: Call, source: Tensor, at: int) -> bool:
    """Whether a product sums over samples, or looks rows up among them."""
    if call.name == "scaled_dot_product_attention":
        return at >= source.dim() - 2
    if call.name == "embedding":
        return source is call.argument(1, "weight")
    if call.name == "einsum":
        return False
    right = source is not call.first() and source is call.argument(1, "other", "mat2")
    return right and at >= source.dim() - 2


def _in_equation(call: Call, source: Tensor, at: int) -> int:
    """Where einsum's equation puts the samples."""
    operands = tensors_in(call.args[1:], {})
    equation = call.args[0] if isinstance(call.args[0], str) else ""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(operands):
        return LOST
    term = next(term for term, operand in zip(terms, operands, strict=True) if operand is source)
    if term.startswith("...") and right.startswith("...") and at == 0:
        return 0
    letter = term[at] if "." not in term else ""
    return right.index(letter) if letter and letter in right and "." not in right else LOST


def tensors_in(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors among a function's arguments, those in lists and tuples included."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(tensors_in(value, {}))
    return found
