"""Random generators whose state is a function of named integers, so that any part of a run can be repeated alone."""

from __future__ import annotations

import numpy as np
import torch


def seeded_generator(*entropy: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the sequence of non-negative integers, e.g. (seed, stream, batch).

    The numbers are hashed (`numpy.random.SeedSequence`): torch's CPU generator reads only the low 32 bits of a seed,
    so shifting one number above another would drop it.
    """
    state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0])
    return torch.Generator(device=device).manual_seed(state)
