"""What holds for every sampler, and systematic sampling of counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_modules.samplers.base import DistributionSampler, systematic_counts
from lightning_modules.timesteps import TimestepIntervals
from tests.lightning_modules.samplers.support import INTERVALS, build, frequencies, informed

NAMES = ("stratified", "uniform", "log_normal", "loss_second_moment", "gradient_noise", "speed")
DISTRIBUTIONS = NAMES[2:]


@pytest.mark.parametrize("name", NAMES)
def test_weighted_mean_is_unbiased(name):
    """Over the exact distribution of t, the weighted loss has the expectation of the loss over uniform t."""
    sampler = informed(name)
    t = torch.arange(40)
    if isinstance(sampler, DistributionSampler):
        p = sampler.probabilities()
    elif name == "uniform":
        p = torch.full((40,), 1 / 40, dtype=torch.float64)
    else:
        p = torch.cat([torch.full((w,), 1 / (4 * w), dtype=torch.float64) for w in INTERVALS.widths])
    loss = torch.sin(t / 7).double() + t
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    factors = sampler.importance(t)
    assert factors.dtype == torch.float32
    assert (p * factors * loss).sum().item() == pytest.approx(loss.mean().item(), rel=1e-6)
    # Within an interval, the weighted mean is the plain one times the interval's factor.
    for task, factor in enumerate(sampler.interval_importance()):
        inside = slice(*INTERVALS.bounds[task : task + 2])
        weighted = (p * factors * loss)[inside].sum() / p[inside].sum()
        assert weighted.item() == pytest.approx((factor * loss[inside].mean()).item(), rel=1e-6)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_frequencies_are_the_probabilities(name):
    sampler = informed(name)
    observed, expected = frequencies(sampler, 23, 4000), sampler.probabilities() * 23 * 4000
    likely = expected > 5
    assert observed[~likely].sum() <= 5 + 5 * expected[~likely].sum()
    # Counts per interval vary less than a multinomial's, which only brings the statistic down.
    deviation = ((observed - expected).square() / expected)[likely].sum().item()
    assert stats.chi2.sf(deviation, int(likely.sum())) > 1e-4


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_counts_per_task_are_the_expected_ones_rounded(name):
    sampler = informed(name)
    expected = torch.stack([part.sum() for part in sampler.probabilities().split(INTERVALS.widths)]) * 17
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        task = INTERVALS.task_of(sampler.sample(17, generator))
        counts = torch.bincount(task, minlength=4)
        assert (task.diff() >= 0).all()
        assert ((counts - expected).abs() < 1).all()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_timesteps_of_a_task_are_in_random_order(name):
    """As the halves of the probe of gradient conflict need: the first and the second sample are exchangeable."""
    sampler = informed(name)
    generator = torch.Generator().manual_seed(4)
    pairs = []
    for _ in range(2000):
        t = sampler.sample(40, generator)
        inside = t[t >= 12]
        if len(inside) > 1:
            pairs.append(inside[:2])
    first, second = torch.stack(pairs).double().T
    assert len(pairs) > 500
    assert stats.ks_2samp(first, second).pvalue > 1e-3
    assert abs(stats.pearsonr(first, second).statistic) < 5 / len(pairs) ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_draws_depend_on_generator_and_state_and_change_neither(name):
    sampler = informed(name)
    before = {key: value.clone() for key, value in sampler.state_dict().items()}
    first, second = (sampler.sample(64, torch.Generator().manual_seed(9)) for _ in range(2))
    sampler.importance(first)
    assert torch.equal(first, second)
    assert first.dtype == torch.int64
    assert all(torch.equal(before[key], value) for key, value in sampler.state_dict().items())
    assert not torch.equal(first, sampler.sample(64, torch.Generator().manual_seed(10)))
    torch.manual_seed(1)
    assert sampler.sample(5).shape == (5,)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_restores_the_distribution(name):
    sampler, fresh = informed(name), build(name)
    fresh.load_state_dict(sampler.state_dict())
    t = torch.arange(40).reshape(5, 8)
    assert torch.equal(fresh.importance(t), sampler.importance(t))
    assert fresh.importance(t).shape == t.shape
    drawn = [s.sample(33, torch.Generator().manual_seed(2)) for s in (sampler, fresh)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", NAMES)
def test_only_samplers_that_learn_have_state(name):
    learned = {"loss_second_moment": {"history", "seen"}, "gradient_noise": {"moments"}}
    assert set(build(name).state_dict()) == learned.get(name, set())


@pytest.mark.parametrize("name", NAMES)
def test_the_objective_is_left_alone_where_the_sampler_only_changes_the_variance(name):
    assert build(name).is_weighted == (name in ("stratified", "loss_second_moment", "gradient_noise"))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=9).filter(any), st.integers(1, 200))
def test_systematic_counts_round_without_bias(shares, count):
    expected = torch.tensor(shares, dtype=torch.float64) / sum(shares) * count
    offsets = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    counts = torch.stack([systematic_counts(expected, count, offset) for offset in offsets])
    assert (counts.sum(1) == count).all()
    assert ((counts - expected).abs() < 1 + 1e-9).all()
    # The mean over the grid of offsets is that over all offsets up to the grid's spacing.
    torch.testing.assert_close(counts.double().mean(0), expected, atol=3e-3, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 1 - 2**-53])
def test_systematic_counts_survive_rounding(offset):
    expected = torch.full((10,), 0.1, dtype=torch.float64) * 3
    counts = systematic_counts(expected, 3, torch.tensor(offset, dtype=torch.float64))
    assert counts.sum() == 3
    assert counts.min() >= 0


def test_a_distribution_of_mass_zero_in_a_task_never_draws_it():
    class Half(DistributionSampler):
        is_weighted = True

        def probabilities(self):
            return torch.tensor([0.0] * 3 + [0.5, 0.0, 0.5] + [0.0] * 4, dtype=torch.float64)

    sampler = Half(TimestepIntervals.explicit([0, 3, 6, 10]))
    drawn = frequencies(sampler, 7, 300)
    assert set(torch.nonzero(drawn).flatten().tolist()) == {3, 5}
    assert sampler.importance(torch.arange(10)).isfinite().all()
    assert sampler.interval_importance().isfinite().all()
