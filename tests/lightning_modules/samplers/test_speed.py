"""SpeeD's asymmetric sampling against its formulas."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.errors import UserInputError
from lightning_modules.noise_schedules import NoiseSchedule
from lightning_modules.samplers import SamplerConfig, build_sampler
from lightning_modules.samplers.speed import convergence_start
from lightning_modules.timesteps import TimestepIntervals
from tests.lightning_modules.samplers.support import build, log_snr


def test_probabilities_are_the_step_function_of_the_paper():
    sampler = build("speed", speed_k=5.0, speed_tau=15)
    expected = [5 / (40 + 15 * 4) if t < 15 else 1 / (40 + 15 * 4) for t in range(40)]
    torch.testing.assert_close(sampler.probabilities(), torch.tensor(expected, dtype=torch.float64))


def test_tau_is_that_of_the_authors_for_their_schedule():
    intervals = TimestepIntervals.uniform(1000, 8)
    assert build_sampler(SamplerConfig("speed"), intervals, log_snr(1000)).tau == 700
    # As it is for the single precision in which a diffusion keeps its log-SNR.
    assert build_sampler(SamplerConfig("speed"), intervals, log_snr(1000).float()).tau == 700


@pytest.mark.parametrize("magnitude", [10.0, 144.0, 1000.0])
def test_tau_agrees_with_the_papers_formula_for_linear_betas(magnitude):
    betas = NoiseSchedule.named("linear", 1000).betas
    first, spread = betas[0], betas[-1] - betas[0]
    root = math.sqrt(2000 * math.log(magnitude) / spread + (1000 * first / spread) ** 2)
    # The formula drops the second order of log(1 - beta), which is half a percent of beta's size.
    assert convergence_start(log_snr(1000), magnitude) == pytest.approx(root - 1000 * first / spread, rel=0.01)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_tau_splits_the_schedule_at_the_magnitude(schedule):
    signal = NoiseSchedule.named(schedule, 250).alphas_cumprod
    tau = convergence_start(log_snr(250, schedule), 50.0)
    assert signal[tau - 1] > 1 / 50 >= signal[tau]


def test_a_tau_beyond_the_schedule_is_refused():
    with pytest.raises(UserInputError, match=r"sampler\.speed_tau is 41: it must be at most T = 40"):
        build("speed", speed_tau=41)


@pytest.mark.parametrize("magnitude", [1.0000001, 1e30])
def test_a_magnitude_beyond_the_schedule_is_refused(magnitude):
    with pytest.raises(UserInputError, match=r"sampler\.speed_magnitude"):
        build("speed", speed_magnitude=magnitude)
