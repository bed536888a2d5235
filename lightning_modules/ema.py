"""Exponential moving average of the weights, with a warm-up that forgets the initialisation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

_Tensors = list[Tensor] | tuple[Tensor, ...]


def warm_decay(decay: float, updates: int) -> float:
    """Decay after ``updates`` averages: min(decay, (1 + n) / (10 + n)), the schedule of TensorFlow's moving average.

    The average then spans about a tenth of the training so far until it reaches its final length, so that a run
    shorter than 1 / (1 - decay) steps is not averaged with its initialisation.
    """
    return min(decay, (1 + updates) / (10 + updates))


def averaged_copy(model: nn.Module, decay: float) -> AveragedModel:
    """A frozen copy of ``model`` that follows it at `warm_decay` with each call of ``update_parameters(model)``."""
    return AveragedModel(model, multi_avg_fn=functools.partial(_average, decay=decay)).requires_grad_(False)


# Not a closure: processes that are spawned receive the module pickled.
def _average(averaged: _Tensors, current: _Tensors, updates: Tensor | int, *, decay: float) -> None:
    torch._foreach_lerp_(averaged, current, 1 - warm_decay(decay, int(updates)))
