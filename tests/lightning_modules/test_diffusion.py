"""Noising, targets, losses and the reverse step, against diffusers, torch.distributions and direct integration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lightning_modules.diffusion import (
    DiffusionConfig,
    GaussianDiffusion,
    discretized_gaussian_log_likelihood,
    gaussian_kl,
)
from lightning_modules.errors import UserInputError
from lightning_modules.noise_schedules import NoiseSchedule

TARGETS = ("epsilon", "x0", "v")
PREDICTION_TYPE = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
T_EDGES = torch.tensor([0, 1, 500, 999])


def draw(seed: int = 0, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Data in [-1, 1] and noise, (4, channels, 4, 4), float64."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(4, channels, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    return x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64)


def oracle(schedule: str = "cosine", **arguments: object) -> DDPMScheduler:
    return DDPMScheduler(1000, trained_betas=NoiseSchedule.named(schedule, 1000).betas, clip_sample=False, **arguments)


def test_noising_and_v_are_those_of_diffusers() -> None:
    x0, noise = draw()
    diffusion = GaussianDiffusion(DiffusionConfig("linear", target="v"))
    scheduler = oracle("linear")
    x_t, v = diffusion.q_sample(x0, T_EDGES, noise), diffusion.target(x0, noise, T_EDGES)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, T_EDGES), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(v, scheduler.get_velocity(x0, noise, T_EDGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("target", TARGETS)
def test_true_target_gives_back_x0_epsilon_and_v(schedule: str, target: str) -> None:
    x0, noise = draw()
    diffusion = GaussianDiffusion(DiffusionConfig(schedule, target=target))
    v = GaussianDiffusion(DiffusionConfig(schedule, target="v")).target(x0, noise, T_EDGES)
    prediction, x_t = diffusion.target(x0, noise, T_EDGES), diffusion.q_sample(x0, T_EDGES, noise)
    # Coefficients are rounded to float32, and 1 / sqrt(abar) reaches 2e4 at the end of the cosine schedule.
    tolerance = {"rtol": 0, "atol": 1e-2 if schedule == "cosine" else 1e-4}
    torch.testing.assert_close(diffusion.predict_x0(prediction, x_t, T_EDGES), x0, **tolerance)
    torch.testing.assert_close(diffusion.predict_epsilon(prediction, x_t, T_EDGES), noise, **tolerance)
    torch.testing.assert_close(diffusion.predict_v(prediction, x_t, T_EDGES), v, **tolerance)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("t", [0, 1, 400, 999])
def test_reverse_step_is_that_of_diffusers(target: str, variance: str, t: int) -> None:
    """Mean from the scheduler's step without noise; variance from its own function."""
    diffusion = GaussianDiffusion(DiffusionConfig("linear", target=target, variance=variance))
    x_t, prediction = draw(1)
    output = torch.cat([prediction, draw(2)[1]], dim=1) if variance == "learned_range" else prediction
    posterior = diffusion.p_mean_variance(output, x_t, torch.full((4,), t))
    scheduler = oracle("linear", prediction_type=PREDICTION_TYPE[target], variance_type=variance)
    step = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0), dtype=x_t.dtype)
    noise_scale = torch.exp(0.5 * posterior.log_variance) if t > 0 else torch.zeros(())
    torch.testing.assert_close(step.pred_original_sample, posterior.pred_x0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(step.prev_sample, posterior.mean + noise_scale * noise, rtol=1e-3, atol=1e-3)


def test_clipping_bounds_the_predicted_x0_only_when_asked() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(variance="fixed_small"))
    x_t, prediction = draw(3)
    t = torch.full((4,), 900)
    assert diffusion.p_mean_variance(prediction, x_t, t).pred_x0.abs().max() > 1
    clipped = diffusion.p_mean_variance(prediction, x_t, t, clip_denoised=True)
    assert clipped.pred_x0.abs().max() == 1
    direct = diffusion.p_mean_variance(prediction, x_t, t).pred_x0.clamp(-1, 1)
    coefficients = (diffusion.schedule.posterior_mean_x0[900], diffusion.schedule.posterior_mean_xt[900])
    torch.testing.assert_close(clipped.mean, coefficients[0] * direct + coefficients[1] * x_t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_losses_are_per_sample(target: str) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig("cosine", target=target))
    x0, noise = draw()
    x_t = diffusion.q_sample(x0, T_EDGES, noise)
    output = torch.cat([draw(4)[1], draw(5)[1]], dim=1)
    losses = diffusion.losses(output, x0, x_t, T_EDGES, noise)
    assert losses.vb is not None
    assert losses.mse.shape == losses.vb.shape == (4,)
    for b in range(4):
        one = slice(b, b + 1)
        alone = diffusion.losses(output[one], x0[one], x_t[one], T_EDGES[one], noise[one])
        torch.testing.assert_close(alone.mse, losses.mse[one])
        torch.testing.assert_close(alone.vb, losses.vb[one])
        error = (output[b, :3] - diffusion.target(x0, noise, T_EDGES)[b]).square()
        torch.testing.assert_close(losses.mse[b], error.mean())


@pytest.mark.parametrize("target", TARGETS)
def test_variational_term_is_the_divergence_of_the_reverse_step(target: str) -> None:
    """torch.distributions as the oracle of the KL, the tanh-free normal distribution function of the decoder."""
    diffusion = GaussianDiffusion(DiffusionConfig("linear", target=target))
    x0, noise = draw()
    x_t = diffusion.q_sample(x0, T_EDGES, noise)
    output = torch.cat([diffusion.target(x0, noise, T_EDGES) + 0.01 * draw(6)[1], 0.3 * draw(7)[1]], dim=1)
    vb = diffusion.losses(output, x0, x_t, T_EDGES, noise).vb
    assert vb is not None
    posterior = diffusion.p_mean_variance(output, x_t, T_EDGES)
    std = torch.exp(0.5 * posterior.log_variance)
    for b, t in enumerate(T_EDGES.tolist()):
        if t == 0:
            edges = [x0[b] + shift / 255 for shift in (-1, 1)]
            lower, upper = (norm.cdf(edge, posterior.mean[b], std[b]) for edge in edges)
            expected = -torch.from_numpy(upper - lower).log()
            tolerance = 2e-2  # of the tanh approximation
        else:
            schedule = diffusion.schedule
            true_mean = schedule.posterior_mean_x0[t] * x0[b] + schedule.posterior_mean_xt[t] * x_t[b]
            true = Normal(true_mean, math.sqrt(schedule.posterior_variance[t]))
            expected = kl_divergence(true, Normal(posterior.mean[b], std[b]))
            tolerance = 1e-4
        torch.testing.assert_close(vb[b], expected.mean() / math.log(2), rtol=tolerance, atol=1e-7)


def test_variational_term_trains_the_variance_only() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig("linear"))
    x0, noise = draw()
    output = torch.cat([noise + 0.1, draw(8)[1]], dim=1).requires_grad_()
    losses = diffusion.losses(output, x0, diffusion.q_sample(x0, T_EDGES, noise), T_EDGES, noise)
    assert losses.vb is not None
    (gradient,) = torch.autograd.grad(losses.vb.sum(), output)
    assert (gradient[:, :3] == 0).all()
    assert (gradient[:, 3:].flatten(1).abs().sum(1) > 0).all()


def test_perfect_prediction_with_the_posterior_variance_costs_nothing() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig("linear", target="x0"))
    x0, noise = draw()
    t = torch.tensor([1, 10, 500, 999])
    output = torch.cat([x0, -torch.ones_like(x0)], dim=1)
    losses = diffusion.losses(output, x0, diffusion.q_sample(x0, t, noise), t, noise)
    assert losses.vb is not None
    assert losses.mse.abs().max() == 0
    assert losses.vb.abs().max() < 1e-12


def test_fixed_variance_has_no_variational_term() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(variance="fixed_large"))
    x0, noise = draw()
    assert diffusion.losses(noise, x0, x0, T_EDGES, noise).vb is None
    assert (diffusion.output_channels(3), GaussianDiffusion(DiffusionConfig()).output_channels(3)) == (3, 6)


def test_wrong_number_of_channels_is_an_error() -> None:
    x0, noise = draw()
    for variance, output in (("learned_range", noise), ("fixed_small", torch.cat([noise, noise], dim=1))):
        diffusion = GaussianDiffusion(DiffusionConfig(variance=variance))
        with pytest.raises(ValueError, match="learn_sigma"):
            diffusion.losses(output, x0, x0, T_EDGES, noise)


def test_decoder_likelihood_is_a_distribution_over_256_values() -> None:
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_variance in itertools.product((-1.2, 0.0, 0.77), (-8.0, -4.0, 0.0)):
        log_likelihood = discretized_gaussian_log_likelihood(
            values, torch.full_like(values, mean), torch.full_like(values, log_variance)
        )
        assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-8)


def test_kl_is_that_of_torch_distributions() -> None:
    mean, log_variance, other_mean, other_log_variance = torch.randn(
        4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(other_mean, (other_log_variance / 2).exp()))
    torch.testing.assert_close(gaussian_kl(mean, log_variance, other_mean, other_log_variance), expected)


@pytest.mark.parametrize(
    ("schedule", "num_timesteps"), [("linear", 4), ("linear", 1000), ("scaled_linear", 10), ("cosine", 1000)]
)
@pytest.mark.parametrize("target", TARGETS)
def test_everything_is_finite_at_both_ends_of_the_chain(schedule: str, num_timesteps: int, target: str) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(schedule, num_timesteps, target))
    x0, noise = (values.float()[:2] for values in draw())
    t = torch.tensor([0, num_timesteps - 1])
    x_t = diffusion.q_sample(x0, t, noise)
    output = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = diffusion.losses(output, x0, x_t, t, noise)
    assert losses.vb is not None
    total = losses.mse + losses.vb
    (gradient,) = torch.autograd.grad(total.sum(), output)
    assert all(torch.isfinite(values).all() for values in (total, gradient, diffusion.log_snr))


def test_coefficients_are_float32_and_not_in_the_state_dict() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig())
    assert not diffusion.state_dict()
    assert {buffer.dtype for buffer in diffusion.buffers()} == {torch.float32}
    x0, noise = draw()
    assert diffusion.q_sample(x0, T_EDGES, noise).dtype == torch.float64
    low = diffusion.losses(torch.cat([noise, noise], 1).bfloat16(), x0.float(), x0.float(), T_EDGES, noise.float())
    assert low.vb is not None
    assert low.mse.dtype == low.vb.dtype == torch.float32


def test_snr_is_signal_over_noise() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig("cosine", 100))
    ratio = (diffusion.get_buffer("signal_scale") / diffusion.get_buffer("noise_scale")).square()
    torch.testing.assert_close(diffusion.snr, ratio, rtol=1e-5, atol=0)
    torch.testing.assert_close(diffusion.log_snr, ratio.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"schedule": "sigmoid"}, "schedule is 'sigmoid'"),
        ({"target": "noise"}, "target is 'noise'"),
        ({"variance": "learned"}, "variance is 'learned'"),
        ({"num_timesteps": 1}, "num_timesteps is 1"),
    ],
)
def test_config_errors_name_the_culprit(arguments: dict, culprit: str) -> None:
    with pytest.raises(UserInputError, match=culprit):
        DiffusionConfig(**arguments)
