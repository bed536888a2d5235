"""Tests for `lightning_modules/ema.py`."""

import pytest
import torch
from torch import nn

from lightning_modules.ema import averaged_copy, warm_decay


def test_the_decay_warms_up_to_its_final_value():
    assert warm_decay(0.9999, 0) == pytest.approx(0.1)
    assert warm_decay(0.9999, 90) == pytest.approx(0.91)
    assert warm_decay(0.99, 10**6) == 0.99


def test_the_average_follows_the_recursion_and_leaves_no_trace_of_the_initialisation():
    model = nn.Linear(3, 2).double()
    average = averaged_copy(model, 0.9999)
    expected = None
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update_parameters(model)
        decay = warm_decay(0.9999, step)
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    assert average.module.weight[0, 0].item() == pytest.approx(expected, rel=1e-12)
    # A constant decay of 0.9999 would still be within 2 of the start.
    assert average.module.weight[0, 0].item() > 150


def test_the_average_is_not_trained():
    assert not any(p.requires_grad for p in averaged_copy(nn.Linear(3, 2), 0.9).parameters())
