"""What the tests of the recorder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

GROUP = torch.tensor([0, 1, 1, 4, 0, 2, 2, 1])
"""Unordered, unequal, group 3 empty; five groups of eight samples."""


class Model(nn.Module):
    """A model written as one function of itself and the batch."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)
        self.double()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64, with no trained weight at zero."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter(*shape: int, seed: int = 2) -> nn.Parameter:
    return nn.Parameter(0.5 * normal(*shape, seed=seed) + 0.1)


def squares(output: Tensor) -> Tensor:
    """A loss per sample (B,) whose gradients differ between samples."""
    return (output.reshape(len(output), -1).square().mean(1) + output.reshape(len(output), -1).sum(1).sin()) / 2
