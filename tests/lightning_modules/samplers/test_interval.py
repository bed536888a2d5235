"""The samplers of today's runs give today's timesteps and weights, bit for bit."""

from __future__ import annotations

import torch

from tests.lightning_modules.samplers.support import INTERVALS, build


def generators():
    return torch.Generator().manual_seed(11), torch.Generator().manual_seed(11)


def test_stratified_is_that_of_the_intervals():
    sampler, (ours, theirs) = build("stratified"), generators()
    t = sampler.sample(30, ours)
    assert torch.equal(t, INTERVALS.sample_stratified(30, theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert torch.equal(sampler.importance(t), INTERVALS.importance(t))
    assert torch.equal(sampler.interval_importance(), INTERVALS.importance(torch.tensor([0, 3, 10, 12])).double())


def test_uniform_is_that_of_the_intervals():
    sampler, (ours, theirs) = build("uniform"), generators()
    t = sampler.sample(30, ours)
    assert torch.equal(t, INTERVALS.sample_uniform(30, theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert torch.equal(sampler.importance(t), torch.ones(30))
