"""Importance sampling of tasks: unbiased moments, and a gradient of less variance."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.errors import UserInputError
from lightning_modules.gradients.groups import split_tasks
from lightning_modules.samplers.gradient_noise import gradient_moments
from tests.lightning_modules.samplers.support import INTERVALS, build

SIZE = 12  # parameters of the simulated model
GENERATOR = torch.Generator().manual_seed(0)
MEANS = torch.randn(4, SIZE, generator=GENERATOR, dtype=torch.float64) * torch.tensor([[0.3], [1.0], [0.1], [0.5]])
STDS = torch.rand(4, SIZE, generator=GENERATOR, dtype=torch.float64) * torch.tensor([[9.0], [1.0], [0.3], [3.0]])
SQUARED_MEAN, VARIANCE = MEANS.square().sum(1), STDS.square().sum(1)
SHARES = torch.tensor(INTERVALS.widths) / 40


def gradients_at(t, generator):
    """Gradients (B, SIZE) of samples whose moments depend on the task alone."""
    task = INTERVALS.task_of(t)
    return MEANS[task] + STDS[task] * torch.randn(len(t), SIZE, generator=generator, dtype=torch.float64)


def measure(t, halves, generator):
    """Gramian and counts of the groups' mean gradients, as the probe has them."""
    group = split_tasks(INTERVALS.task_of(t), 4, halves)
    counts = torch.bincount(group, minlength=4 * halves)
    sums = torch.zeros(4 * halves, SIZE, dtype=torch.float64).index_add_(0, group, gradients_at(t, generator))
    rows = sums / counts.clamp(min=1)[:, None]
    return rows @ rows.T, counts


@pytest.mark.parametrize(("halves", "count"), [(2, 16), (2, 23), (3, 40)])
def test_moments_are_unbiased(halves, count):
    """With equal groups and, where tasks and halves do not divide the batch, unequal ones."""
    generator = torch.Generator().manual_seed(1)
    means, variances = [], []
    for _ in range(2500):
        gramian, counts = measure(INTERVALS.sample_stratified(count, generator), halves, generator)
        moments = gradient_moments(gramian, counts, halves)
        assert moments.measured.all()
        assert (moments.variance >= 0).all()
        means.append(moments.mean)
        variances.append(moments.variance)
    for estimates, truth in ((means, SQUARED_MEAN), (variances, VARIANCE)):
        estimates = torch.stack(estimates)
        error = estimates.std(0) / len(estimates) ** 0.5
        assert ((estimates.mean(0) - truth).abs() < 4.5 * error).all()
        assert (error < 0.1 * (SQUARED_MEAN + VARIANCE)).all()


def test_an_estimate_of_the_second_moment_is_never_negative():
    generator = torch.Generator().manual_seed(2)
    for _ in range(500):
        moments = gradient_moments(*measure(INTERVALS.sample_stratified(9, generator), 2, generator), 2)
        assert (moments.mean + moments.variance >= -1e-12)[moments.measured].all()


def trained(moment="second_moment", floor=0.02, measurements=300):
    sampler = build(
        "gradient_noise", gradient_noise_moment=moment, gradient_noise_floor=floor, gradient_noise_decay=0.99
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(measurements):
        sampler.observe_gradients(*measure(sampler.sample(32, generator), 2, generator), 2)
    return sampler


def mass_of(sampler):
    return torch.stack([part.sum() for part in sampler.probabilities().split(INTERVALS.widths)])


@pytest.mark.parametrize("moment", ["second_moment", "variance"])
def test_probabilities_of_the_tasks_are_the_optimal_ones(moment):
    size = VARIANCE if moment == "variance" else SQUARED_MEAN + VARIANCE
    optimal = SHARES * size.sqrt()
    expected = 0.98 * optimal / optimal.sum() + 0.02 * SHARES
    torch.testing.assert_close(mass_of(trained(moment)), expected.double(), rtol=0.1, atol=0.003)


def gradient_variance(sampler, count=32, draws=4000):
    """Mean squared distance of the weighted mean gradient from the gradient over uniform t."""
    generator = torch.Generator().manual_seed(4)
    truth = (SHARES[:, None] * MEANS).sum(0)
    total, mean = 0.0, torch.zeros(SIZE, dtype=torch.float64)
    for _ in range(draws):
        t = sampler.sample(count, generator)
        estimate = (sampler.importance(t)[:, None] * gradients_at(t, generator)).mean(0)
        total += (estimate - truth).square().sum().item() / draws
        mean += estimate / draws
    assert (mean - truth).square().sum().item() < 4 * total / draws
    return total


@pytest.mark.parametrize("moment", ["second_moment", "variance"])
def test_variance_is_below_that_of_stratified_timesteps_and_near_the_optimum(moment):
    count = 32
    optimum = (SHARES * VARIANCE.sqrt()).sum().square().item() / count  # Neyman's
    stratified = (SHARES.square() * VARIANCE / (count / 4)).sum().item()
    assert gradient_variance(build("stratified")) == pytest.approx(stratified, rel=0.05)
    variance = gradient_variance(trained(moment))
    assert optimum * 0.97 < variance < optimum * 1.1
    assert variance < 0.8 * stratified


def test_it_is_stratified_until_every_task_is_measured():
    sampler = build("gradient_noise")
    gramian = torch.eye(8, dtype=torch.float64)
    t = torch.arange(40)
    for counts in ([0] * 8, [4, 4, 4, 4, 4, 4, 0, 8]):
        sampler.observe_gradients(gramian, torch.tensor(counts), 2)
        assert not sampler.is_informed
        drawn = sampler.sample(30, torch.Generator().manual_seed(6))
        assert torch.equal(drawn, INTERVALS.sample_stratified(30, torch.Generator().manual_seed(6)))
        assert torch.equal(sampler.importance(t), INTERVALS.importance(t))
        torch.testing.assert_close(mass_of(sampler), torch.full((4,), 0.25, dtype=torch.float64))
    sampler.observe_gradients(gramian, torch.full((8,), 4), 2)
    assert sampler.is_informed
    # All gradients alike: in proportion to the widths.
    torch.testing.assert_close(mass_of(sampler), SHARES.double())


def test_averages_decay_per_task_and_start_without_bias():
    sampler = build("gradient_noise", gradient_noise_decay=0.75)
    first, second = torch.diag(torch.arange(1.0, 9)).double(), torch.diag(torch.arange(8.0, 0, -1)).double()
    counts = torch.full((8,), 4)
    sampler.observe_gradients(first, counts, 2)
    before = gradient_moments(first, counts, 2)
    weight, mean, variance = sampler.moments
    torch.testing.assert_close(mean / weight, before.mean)
    torch.testing.assert_close(variance / weight, before.variance)
    counts[:2] = 0  # nothing of task 0
    sampler.observe_gradients(second, counts, 2)
    after = gradient_moments(second, counts, 2)
    weight, mean, variance = sampler.moments
    expected = (0.75 * before.variance + after.variance) / 1.75
    expected[0] = before.variance[0]
    torch.testing.assert_close(variance / weight, expected)


def test_a_floor_keeps_a_silent_task_alive_and_a_broken_measurement_is_left_out():
    sampler = build("gradient_noise", gradient_noise_floor=0.1)
    gramian = torch.eye(8, dtype=torch.float64)
    gramian[0, 0] = gramian[1, 1] = 0
    counts = torch.full((8,), 4)
    sampler.observe_gradients(gramian, counts, 2)
    assert mass_of(sampler)[0].item() == pytest.approx(0.1 * 3 / 40)
    state = sampler.moments.clone()
    sampler.observe_gradients(torch.full((8, 8), torch.nan, dtype=torch.float64), counts, 2)
    assert torch.equal(sampler.moments, state)


def test_gradients_that_all_vanish_leave_it_stratified():
    sampler = build("gradient_noise")
    sampler.observe_gradients(torch.zeros(8, 8, dtype=torch.float64), torch.full((8,), 4), 2)
    assert not sampler.is_informed


def test_one_half_cannot_tell_noise_from_the_mean():
    with pytest.raises(UserInputError, match="gradient_conflict halves is 1: it must be at least 2"):
        build("gradient_noise").observe_gradients(torch.eye(4).double(), torch.full((4,), 8), 1)


def test_a_gramian_of_other_tasks_is_an_error():
    with pytest.raises(ValueError, match=r"need a Gramian \(8, 8\)"):
        build("gradient_noise").observe_gradients(torch.eye(6).double(), torch.full((6,), 8), 2)
