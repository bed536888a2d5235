"""Random generators whose state is a function of named integers, so that any part of a run can be repeated alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


def seeded_generator(*entropy: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the sequence of non-negative integers, e.g. (seed, stream, batch).

    The numbers are hashed (`numpy.random.SeedSequence`): torch's CPU generator reads only the low 32 bits of a seed,
    so shifting one number above another would drop it.
    """
    return torch.Generator(device=device).manual_seed(_state(entropy))


@contextlib.contextmanager
def seeded_dropout(model: nn.Module, *entropy: int) -> Iterator[None]:
    """Lets the model's dropout draw the same whenever it is given the same integers, and nothing else notice.

    torch's dropout takes no generator of its own, only the global one.
    """
    if not any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        yield
        return
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_state(entropy))
        yield


@contextlib.contextmanager
def seeded_global(*entropy: int) -> Iterator[None]:
    """Lets whatever draws from torch's global generator on the CPU draw the same for the same integers, unnoticed."""
    generator = torch.default_generator  # torch.manual_seed would seed those of other devices, too
    before = generator.get_state()
    generator.manual_seed(_state(entropy))
    try:
        yield
    finally:
        generator.set_state(before)


def _state(entropy: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0])
