"""Schedules and posterior coefficients, against diffusers and against the definition of the joint Gaussian."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDPMScheduler

from lightning_modules.errors import UserInputError
from lightning_modules.noise_schedules import MAX_BETA, NoiseSchedule, schedule_betas

SCHEDULES = ("linear", "scaled_linear", "cosine")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("linear", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
        ("scaled_linear", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_betas_are_those_of_diffusers(name: str, arguments: dict) -> None:
    oracle = DDPMScheduler(num_train_timesteps=1000, **arguments)
    schedule = NoiseSchedule.named(name, 1000)
    np.testing.assert_allclose(schedule.betas, oracle.betas.double().numpy(), rtol=2e-6)
    # diffusers accumulates its product of 1000 factors in float32.
    np.testing.assert_allclose(schedule.alphas_cumprod, oracle.alphas_cumprod.double().numpy(), rtol=2e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [2, 10, 50, 100, 4000])
def test_any_number_of_timesteps_gives_a_proper_schedule(name: str, num_timesteps: int) -> None:
    schedule = NoiseSchedule.named(name, num_timesteps)
    assert schedule.betas.shape == (num_timesteps,)
    assert ((schedule.betas > 0) & (schedule.betas <= MAX_BETA)).all()
    assert (np.diff(schedule.snr) < 0).all()
    assert schedule.snr[-1] > 0
    assert np.isfinite(np.log(schedule.snr)).all()
    for values in (schedule.posterior_log_variance, schedule.large_log_variance, schedule.posterior_mean_x0):
        assert np.isfinite(values).all()


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
@pytest.mark.parametrize("num_timesteps", [250, 4000])
def test_final_noise_level_hardly_depends_on_the_number_of_timesteps(name: str, num_timesteps: int) -> None:
    final = [np.log(NoiseSchedule.named(name, T).snr[-1]) for T in (1000, num_timesteps)]
    assert final[0] == pytest.approx(final[1], abs=0.5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_bayes_rule(name: str) -> None:
    """q(x_{t-1} | x_t, x_0) by conditioning the joint Gaussian of (x_{t-1}, x_t) given x_0."""
    schedule = NoiseSchedule.named(name, 100)
    for t in (1, 50, 99):
        before, beta = schedule.alphas_cumprod[t - 1], schedule.betas[t]
        variance_before, covariance = 1 - before, (1 - before) * np.sqrt(1 - beta)
        variance = (1 - beta) * variance_before + beta
        gain = covariance / variance
        assert schedule.posterior_mean_xt[t] == pytest.approx(gain, rel=1e-9)
        mean_x0 = np.sqrt(before) - gain * np.sqrt((1 - beta) * before)
        assert schedule.posterior_mean_x0[t] == pytest.approx(mean_x0, rel=1e-9)
        assert schedule.posterior_variance[t] == pytest.approx(variance_before - gain * covariance, rel=1e-9)


def test_log_variances_at_the_first_timestep_are_those_of_the_second() -> None:
    schedule = NoiseSchedule.named("linear", 1000)
    assert schedule.posterior_variance[0] == 0
    np.testing.assert_allclose(np.exp(schedule.posterior_log_variance[1:]), schedule.posterior_variance[1:])
    np.testing.assert_allclose(np.exp(schedule.large_log_variance[1:]), schedule.betas[1:])
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]
    assert schedule.large_log_variance[0] == schedule.posterior_log_variance[1]


def test_errors_name_the_culprit() -> None:
    with pytest.raises(UserInputError, match="unknown noise schedule 'quadratic': choose one of linear"):
        schedule_betas("quadratic", 1000)
    with pytest.raises(UserInputError, match="num_timesteps is 1"):
        schedule_betas("linear", 1)
