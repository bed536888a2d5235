"""Backward passes under a function mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

BACKWARD = {torch.Tensor.backward, torch.autograd.backward}
"""The functions that start a backward pass which leaves gradients in ``.grad``."""


def run_backward(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Runs one of `BACKWARD`, in the form in which a function mode receives it.

    A mode is switched off while it handles a call, and every public function would arrive at the mode again; only
    the engine's own entry lets the mode be active during the backward pass.
    """
    tensors, gradients = _roots(func, args, kwargs)
    inputs = kwargs.get("inputs")
    create_graph = bool(kwargs.get("create_graph"))
    retain_graph = kwargs.get("retain_graph")
    _engine_run_backward(
        tensors,
        gradients,
        create_graph if retain_graph is None else retain_graph,
        create_graph,
        (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ()),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def gradients_at(output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of part of a graph, asked for while a backward pass runs; the graph is kept.

    As `torch.autograd.grad`, but under the mode that is active: checkpointed parts are run again as they first were.
    """
    with torch._C._EnableTorchFunction():
        return _engine_run_backward(
            (output,), (cotangent,), True, False, tuple(inputs), allow_unreachable=True, accumulate_grad=False
        )


def _roots(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Where a backward pass starts, and with what gradients."""
    given = kwargs.get("gradient" if func is torch.Tensor.backward else "grad_tensors")
    tensors = (args[0],) if isinstance(args[0], Tensor) else tuple(args[0])
    gradients = (given,) * len(tensors) if given is None or isinstance(given, Tensor) else tuple(given)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if gradient is None and tensor.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
    return tensors, tuple(
        torch.ones_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(tensors, gradients, strict=True)
    )
