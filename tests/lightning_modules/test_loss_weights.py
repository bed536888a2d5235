"""Loss weights, against the targets' relation to each other on actual errors."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.diffusion import DiffusionConfig, GaussianDiffusion
from lightning_modules.errors import UserInputError
from lightning_modules.loss_weights import LossWeightConfig, loss_weight, timestep_weights

TARGETS = ("epsilon", "x0", "v")
SNR = torch.logspace(-8, 8, 65, dtype=torch.float64)
WEIGHTINGS = [
    LossWeightConfig("min_snr"),
    LossWeightConfig("min_snr", min_snr_gamma=0.5),
    LossWeightConfig("p2"),
    LossWeightConfig("p2", p2_gamma=0.5, p2_k=2.0),
    LossWeightConfig("p2", p2_gamma=1.7),
]
SPEED = LossWeightConfig("speed")


def diffusion_of(target: str, schedule: str = "linear", num_timesteps: int = 1000) -> GaussianDiffusion:
    return GaussianDiffusion(DiffusionConfig(schedule, num_timesteps, target, variance="fixed_small"))


@pytest.mark.parametrize("config", [*WEIGHTINGS, SPEED, LossWeightConfig("speed", speed_lambda=1.0)])
def test_weighted_error_does_not_depend_on_the_target(config: LossWeightConfig) -> None:
    """One and the same wrong guess of x_0, expressed in each target, must cost the same after weighting."""
    generator = torch.Generator().manual_seed(0)
    x0, guess, noise = torch.randn(3, 50, 2, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.linspace(0, 999, 50).long()
    losses = {}
    for target in TARGETS:
        diffusion = diffusion_of(target).double()
        x_t = diffusion.q_sample(x0, t, noise)
        to_x0 = diffusion_of("x0").double()
        convert = {"epsilon": to_x0.predict_epsilon, "x0": to_x0.predict_x0, "v": to_x0.predict_v}[target]
        mse = diffusion.losses(convert(guess, x_t, t), x0, x_t, t, noise).mse
        losses[target] = timestep_weights(config, diffusion)[t] * mse
    torch.testing.assert_close(losses["epsilon"], losses["x0"], rtol=1e-2, atol=0)
    torch.testing.assert_close(losses["v"], losses["x0"], rtol=1e-2, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_as_published(gamma: float) -> None:
    config = LossWeightConfig("min_snr", min_snr_gamma=gamma)
    cut = torch.minimum(SNR, torch.tensor(gamma))
    torch.testing.assert_close(loss_weight(config, SNR, "x0"), cut)
    torch.testing.assert_close(loss_weight(config, SNR, "epsilon"), cut / SNR)
    torch.testing.assert_close(loss_weight(config, SNR, "v"), cut / (SNR + 1))


@pytest.mark.parametrize(("gamma", "k"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (2.0, 0.3)])
def test_p2_as_published(gamma: float, k: float) -> None:
    config = LossWeightConfig("p2", p2_gamma=gamma, p2_k=k)
    on_epsilon = 1 / (k + SNR) ** gamma
    torch.testing.assert_close(loss_weight(config, SNR, "epsilon"), on_epsilon)
    torch.testing.assert_close(loss_weight(config, SNR, "x0"), on_epsilon * SNR)
    torch.testing.assert_close(loss_weight(config, SNR, "v"), on_epsilon * SNR / (SNR + 1))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["uniform", "edm2"])
def test_uniform_leaves_every_target_alone(name: str, target: str) -> None:
    """As does what EDM2's uncertainty, learned elsewhere, multiplies."""
    assert (loss_weight(LossWeightConfig(name), SNR, target) == 1).all()


@pytest.mark.parametrize("config", [LossWeightConfig(), LossWeightConfig("edm2"), *WEIGHTINGS])
def test_weights_of_timesteps_are_those_of_their_snr(config: LossWeightConfig) -> None:
    for target in TARGETS:
        diffusion = diffusion_of(target, "cosine")
        expected = loss_weight(config, diffusion.snr, target)
        assert torch.equal(timestep_weights(config, diffusion), expected)


@pytest.mark.parametrize("symmetry", [0.5, 0.6, 1.0])
def test_speed_as_published(symmetry: float) -> None:
    """The derivative of 2 (1 - abar), the variance of an increment, in closed form for linear betas."""
    first, spread, size = 1e-4, 0.0199, 1000
    t = [step + 1 for step in range(size)]
    change = [2 * (first + spread * s / size) * math.exp(-(first + spread * s / size / 2) * s) for s in t]
    low, high = min(change), max(change)
    expected = [1 - symmetry + (2 * symmetry - 1) * (value - low) / (high - low) for value in change]
    weights = timestep_weights(LossWeightConfig("speed", speed_lambda=symmetry), diffusion_of("epsilon"))
    torch.testing.assert_close(weights, torch.tensor(expected), atol=0.01, rtol=0)
    assert weights.min().item() == pytest.approx(1 - symmetry, abs=1e-6)
    assert weights.max().item() == pytest.approx(symmetry, abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_timesteps", [2, 3, 1000])
def test_speed_weights_are_finite_for_any_schedule(schedule: str, target: str, num_timesteps: int) -> None:
    diffusion = diffusion_of(target, schedule, num_timesteps)
    weights = timestep_weights(SPEED, diffusion)
    assert weights.shape == (num_timesteps,)
    assert weights.dtype == diffusion.snr.dtype
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()


def test_speed_has_no_weights_for_an_snr_alone() -> None:
    with pytest.raises(ValueError, match="use timestep_weights"):
        loss_weight(SPEED, SNR, "epsilon")


@pytest.mark.parametrize("config", [LossWeightConfig(), *WEIGHTINGS, LossWeightConfig("p2", p2_gamma=0.0)])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_finite_for_any_snr(config: LossWeightConfig, target: str, dtype: torch.dtype) -> None:
    snr = torch.tensor([0.0, 1e-38, 1e-9, 1.0, 1e9, 1e38, torch.inf], dtype=dtype)
    weight = loss_weight(config, snr, target)
    assert weight.shape == snr.shape
    assert weight.dtype == dtype
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()


def test_zero_snr_keeps_the_error_of_epsilon_under_min_snr() -> None:
    zero = torch.zeros(1)
    assert [loss_weight(LossWeightConfig("min_snr"), zero, target).item() for target in TARGETS] == [1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"name": "edm"}, "unknown loss weight 'edm'"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma is 0.0"),
        ({"p2_k": -1.0}, "p2_k is -1.0"),
        ({"p2_gamma": float("nan")}, "p2_gamma is nan"),
        ({"speed_lambda": 0.4}, "speed_lambda is 0.4"),
        ({"speed_lambda": 1.1}, "speed_lambda is 1.1"),
        ({"edm2_channels": 0}, "edm2_channels is 0"),
        ({"edm2_learning_rate": 0.0}, "edm2_learning_rate is 0.0"),
    ],
)
def test_config_errors_name_the_culprit(arguments: dict, culprit: str) -> None:
    with pytest.raises(UserInputError, match=culprit):
        LossWeightConfig(**arguments)


def test_unknown_target_is_an_error() -> None:
    with pytest.raises(UserInputError, match="unknown target 'noise'"):
        loss_weight(LossWeightConfig(), SNR, "noise")
