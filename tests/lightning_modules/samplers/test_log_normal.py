"""The discretised log-normal against quadrature and draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lightning_modules.samplers import SamplerConfig, build_sampler
from lightning_modules.samplers.log_normal import normal_cells
from lightning_modules.timesteps import TimestepIntervals
from tests.lightning_modules.samplers.support import log_snr


def sampler_of(num_timesteps, schedule="linear", **settings):
    intervals = TimestepIntervals.uniform(num_timesteps, 4)
    return build_sampler(SamplerConfig("log_normal", **settings), intervals, log_snr(num_timesteps, schedule))


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.5, 0.3)])
def test_probabilities_are_the_normal_mass_of_the_cells(mean, std):
    p = sampler_of(20, log_normal_mean=mean, log_normal_std=std).probabilities().numpy()
    log_sigma = -log_snr(20).numpy() / 2
    edges = [-np.inf, *(log_sigma[1:] + log_sigma[:-1]) / 2, np.inf]
    normal = stats.norm(mean, std)
    for t, (low, high) in enumerate(itertools.pairwise(edges)):
        # Far tails are cut off, where the density is below 1e-22 of its peak.
        low, high = max(low, mean - 10 * std), min(high, mean + 10 * std)
        mass = integrate.quad(normal.pdf, low, high, epsabs=1e-14)[0] if low < high else 0.0
        assert p[t] == pytest.approx(mass, abs=1e-12)


def test_it_is_the_nearest_timestep_to_a_normal_draw():
    log_sigma = -log_snr(20).numpy() / 2
    draws = np.random.default_rng(0).normal(-1.2, 1.2, 40_000)
    nearest = np.abs(draws[:, None] - log_sigma).argmin(1)
    p = sampler_of(20).probabilities().numpy()
    likely = p > 1e-3
    observed = np.bincount(nearest, minlength=20)
    rest = np.append(p[likely], p[~likely].sum()) * len(draws)
    assert stats.chisquare(np.append(observed[likely], observed[~likely].sum()), rest).pvalue > 1e-3


def test_moments_are_those_of_edm_where_the_schedule_covers_them():
    log_sigma = -log_snr(1000) / 2
    p = sampler_of(1000).probabilities()
    mean = (p * log_sigma).sum()
    assert mean.item() == pytest.approx(-1.2, abs=0.01)
    assert (p * (log_sigma - mean).square()).sum().sqrt().item() == pytest.approx(1.2, abs=0.01)


def test_upper_tail_is_as_exact_as_the_lower_one():
    edges = torch.tensor([-8.0, -6.0, 0.0, 6.0, 8.0], dtype=torch.float64)
    p = normal_cells(edges)
    torch.testing.assert_close(p, p.flip(0), rtol=1e-12, atol=0)
    assert p[-1].item() == pytest.approx(stats.norm.sf(8.0), rel=1e-12)


def test_steep_schedules_leave_all_weights_finite():
    sampler = sampler_of(200, "cosine", log_normal_mean=-3.0, log_normal_std=0.05)
    assert (sampler.probabilities() == 0).any()
    assert sampler.importance(torch.arange(200)).isfinite().all()
