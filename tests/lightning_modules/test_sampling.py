"""Sampling, against data whose posterior is known exactly and against the reverse step written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.backbones.dit import DiT, DiTConfig
from lightning_modules.diffusion import DiffusionConfig, GaussianDiffusion
from lightning_modules.errors import UserInputError
from lightning_modules.sampling import guided_output, respaced_timesteps, sample

MEAN, STD = 0.3, 0.5
SHAPE = (64, 4, 16, 16)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class GaussianOracle:
    """The exact denoiser of data N(mean, STD^2), element by element; class y has the mean MEAN * (y + 1)."""

    null_class = 9

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        schedule, step = self.diffusion.schedule, int(t[0])
        signal = schedule.alphas_cumprod[step]
        mean = MEAN if y is None else (MEAN * (y + 1)).view(-1, 1, 1, 1)
        marginal_variance = signal * STD**2 + 1 - signal
        x0 = mean + np.sqrt(signal) * STD**2 / marginal_variance * (x - np.sqrt(signal) * mean)
        epsilon = (x - np.sqrt(signal) * x0) / np.sqrt(1 - signal)
        v = np.sqrt(signal) * epsilon - np.sqrt(1 - signal) * x0
        prediction = {"epsilon": epsilon, "x0": x0, "v": v}[self.diffusion.config.target]
        if self.diffusion.config.variance != "learned_range":
            return prediction
        # Var(x_{t-1} | x_t) = posterior variance + what is unknown of x_0; it lies between the two that are mixed.
        unknown = STD**2 * (1 - signal) / marginal_variance
        variance = schedule.posterior_variance[step] + schedule.posterior_mean_x0[step] ** 2 * unknown
        low, high = schedule.posterior_log_variance[step], np.log(schedule.betas[step])
        share = (np.log(variance) - low) / (high - low)
        return torch.cat([prediction, torch.full_like(prediction, 2 * share - 1)], dim=1)


def assert_gaussian(samples: Tensor, mean: float, std: float, tolerance: float) -> None:
    """Mean and standard deviation up to ``tolerance``; 65,536 elements know both to about 0.002."""
    assert samples.mean().item() == pytest.approx(mean, abs=tolerance)
    assert samples.std().item() == pytest.approx(std, abs=tolerance)


@pytest.mark.parametrize("target", ["epsilon", "x0", "v"])
@pytest.mark.parametrize(("schedule", "num_timesteps"), [("linear", 40), ("scaled_linear", 100), ("cosine", 40)])
def test_ancestral_sampling_with_the_exact_variance_is_exact(target: str, schedule: str, num_timesteps: int) -> None:
    """Gaussian data have Gaussian reverse steps, so even 40 of them leave no error but the start's."""
    diffusion = GaussianDiffusion(DiffusionConfig(schedule, num_timesteps, target, "learned_range"))
    samples = sample(GaussianOracle(diffusion), diffusion, SHAPE, steps=num_timesteps, generator=seeded())
    assert_gaussian(samples, MEAN, STD, 0.008)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_sampling_with_a_fixed_variance(variance: str) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig("linear", 1000, "epsilon", variance))
    samples = sample(GaussianOracle(diffusion), diffusion, SHAPE, steps=500, generator=seeded())
    assert_gaussian(samples, MEAN, STD, 0.02)


@pytest.mark.parametrize(
    ("target", "schedule", "eta"),
    [("epsilon", "linear", 0.0), ("x0", "linear", 0.5), ("v", "cosine", 0.0), ("epsilon", "scaled_linear", 0.0)],
)
def test_ddim_reaches_the_data_distribution(target: str, schedule: str, eta: float) -> None:
    # 300 does not divide 1000, where diffusers' own spacings of DDIM step to timesteps they never visit.
    diffusion = GaussianDiffusion(DiffusionConfig(schedule, 1000, target, "learned_range"))
    arguments = {"steps": 300, "method": "ddim", "eta": eta}
    samples = sample(GaussianOracle(diffusion), diffusion, SHAPE, **arguments, generator=seeded())
    assert_gaussian(samples, MEAN, STD, 0.02)


def assert_same_chain(samples: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to ``tolerance`` of the largest element.

    A chain that predicts epsilon with random weights grows to 4e5, where a small element is the difference of large
    ones: which of its digits survive depends on the processor.
    """
    torch.testing.assert_close(samples, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def arbitrary_model(diffusion: GaussianDiffusion, channels: int = 2) -> DiT:
    """A DiT with random weights in every layer, of 3 classes."""
    learn_sigma = diffusion.config.variance == "learned_range"
    model = DiT(DiTConfig(4, 2, channels, 16, 1, 2, num_classes=3, learn_sigma=learn_sigma)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=seeded())
    return model


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("target", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("clip_sample", [False, True])
def test_full_chain_is_the_reverse_process_step_by_step(variance: str, target: str, clip_sample: bool) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig("linear", 20, target, variance))
    model, y = arbitrary_model(diffusion), torch.tensor([0, 1, 2])
    generator = seeded()
    x = torch.randn(3, 2, 4, 4, generator=generator)
    with torch.no_grad():
        for step in reversed(range(20)):
            t = torch.full((3,), step)
            posterior = diffusion.p_mean_variance(model(x, t, y), x, t, clip_denoised=clip_sample)
            x = posterior.mean
            if step > 0:
                x = x + torch.exp(0.5 * posterior.log_variance) * torch.randn(x.shape, generator=generator)
    arguments = {"steps": 20, "clip_sample": clip_sample}
    samples = sample(model, diffusion, (3, 2, 4, 4), y=y, **arguments, generator=seeded())
    assert_same_chain(samples, x, 1e-5)


@pytest.mark.parametrize("target", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("clip_sample", [False, True])
def test_respaced_ddim_is_its_formula(target: str, clip_sample: bool) -> None:
    """Song et al., 2021, equation 12 with sigma = 0, on timesteps unevenly far apart."""
    diffusion = GaussianDiffusion(DiffusionConfig("cosine", 100, target))
    model, y = arbitrary_model(diffusion), torch.tensor([0, 1, 2])
    timesteps = [99, 82, 66, 50, 33, 16, 0]
    signal = torch.from_numpy(diffusion.schedule.alphas_cumprod).float()
    x = torch.randn(3, 2, 4, 4, generator=seeded())
    with torch.no_grad():
        for now, after in itertools.pairwise([*timesteps, None]):
            t = torch.full((3,), now)
            x0 = diffusion.predict_x0(model(x, t, y)[:, :2], x, t)
            if clip_sample:
                x0 = x0.clamp(-1, 1)
            epsilon = (x - signal[now].sqrt() * x0) / (1 - signal[now]).sqrt()
            left = torch.ones(()) if after is None else signal[after]
            x = left.sqrt() * x0 + (1 - left).sqrt() * epsilon
    arguments = {"steps": 7, "method": "ddim", "clip_sample": clip_sample}
    samples = sample(model, diffusion, (3, 2, 4, 4), y=y, **arguments, generator=seeded())
    assert_same_chain(samples, x, 1e-3)


def test_ddim_with_full_noise_is_ancestral_sampling() -> None:
    """At eta = 1, DDIM is DDPM with the posterior's variance (Song et al., 2021, section 4.1)."""
    diffusion = GaussianDiffusion(DiffusionConfig("linear", 50, variance="fixed_small"))
    model, y = arbitrary_model(diffusion), torch.tensor([0, 1, 2])
    ancestral, full, half = (
        sample(model, diffusion, (3, 2, 4, 4), y=y, steps=12, method=method, eta=eta, generator=seeded())
        for method, eta in (("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5))
    )
    assert_same_chain(full, ancestral, 1e-5)
    assert not torch.allclose(half, full, rtol=1e-1, atol=1e-1)


def test_respaced_timesteps() -> None:
    assert respaced_timesteps(1000, 1000) == list(range(1000))
    assert respaced_timesteps(1000, 1) == [999]
    for steps in (2, 7, 250, 999):
        timesteps = respaced_timesteps(1000, steps)
        assert len(set(timesteps)) == steps
        assert (timesteps[0], timesteps[-1]) == (0, 999)
        gaps = np.diff(timesteps)
        assert gaps.max() - gaps.min() <= 1
        assert (gaps > 0).all()


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_very_few_steps_stay_finite(method: str, steps: int, schedule: str) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(schedule))
    oracle = GaussianOracle(diffusion)
    samples = sample(oracle, diffusion, (2, 4, 4, 4), steps=steps, method=method, generator=seeded())
    assert torch.isfinite(samples).all()


def test_samples_are_seeded() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps=20))
    model, y = arbitrary_model(diffusion), torch.tensor([0, 1, 2])
    first, again, other = (
        sample(model, diffusion, (3, 2, 4, 4), y=y, steps=20, generator=seeded(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert first.dtype == torch.float32
    assert not first.requires_grad


def test_guidance_of_one_is_the_conditional_model_in_one_evaluation() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps=20))
    model, y = arbitrary_model(diffusion), torch.tensor([0, 1, 2])
    x, t = torch.randn(3, 2, 4, 4, generator=seeded()), torch.tensor([3, 3, 3])
    seen: list[int] = []

    def counting(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.append(len(x))
        return model(x, t, y)

    assert torch.equal(guided_output(counting, x, t, y, 1.0), model(x, t, y))
    assert seen == [3]
    almost = guided_output(model, x, t, y, 1 + 1e-6)
    torch.testing.assert_close(almost, model(x, t, y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [None, 3, 1])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_large"])
@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_guidance_is_linear_in_the_guided_channels_only(channels: int | None, variance: str, scale: float) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps=20, variance=variance))
    model, y = arbitrary_model(diffusion, channels=4), torch.tensor([0, 1, 2])
    x, t = torch.randn(3, 4, 4, 4, generator=seeded()), torch.tensor([0, 10, 19])
    conditional, unconditional = model(x, t, y), model(x, t, torch.full((3,), model.null_class))
    guided = 4 if channels is None else channels
    expected = conditional.clone()
    expected[:, :guided] = (1 - scale) * unconditional[:, :guided] + scale * conditional[:, :guided]
    torch.testing.assert_close(guided_output(model, x, t, y, scale, channels), expected, rtol=1e-4, atol=1e-5)


def test_sampling_with_guidance_samples_the_guided_model() -> None:
    """Guidance of Gaussians with equal variances shifts the mean: mean(y) * scale + mean(null) * (1 - scale)."""
    diffusion = GaussianDiffusion(DiffusionConfig("linear", 50, "epsilon", "learned_range"))
    y = torch.zeros(SHAPE[0], dtype=torch.long)
    arguments = {"y": y, "guidance_scale": 1.2, "guidance_channels": 3, "steps": 50}
    samples = sample(GaussianOracle(diffusion), diffusion, SHAPE, **arguments, generator=seeded())
    null_mean = MEAN * (GaussianOracle.null_class + 1)
    assert_gaussian(samples[:, :3], 1.2 * MEAN - 0.2 * null_mean, STD, 0.01)
    assert_gaussian(samples[:, 3:], MEAN, STD, 0.015)


def test_labels_reach_the_model() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig("linear", 50, "epsilon", "learned_range"))
    y = torch.arange(SHAPE[0]) % 2
    samples = sample(GaussianOracle(diffusion), diffusion, SHAPE, y=y, steps=50, generator=seeded())
    for label in (0, 1):
        assert_gaussian(samples[y == label], MEAN * (label + 1), STD, 0.01)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 21}, "steps is 21"),
        ({"method": "euler"}, "unknown sampling method 'euler'"),
        ({"method": "ddim", "eta": 1.5}, "eta is 1.5"),
        ({"eta": 0.5}, "eta is DDIM's noise"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": 2.0, "guidance_channels": 3}, "guidance_channels is 3"),
        ({"guidance_scale": 2.0, "y": None}, "guidance needs class labels"),
        ({"y": torch.tensor([0, 1])}, "do not fit 3 samples"),
    ],
)
def test_bad_arguments_name_the_culprit(arguments: dict, culprit: str) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps=20))
    settings = {"y": torch.tensor([0, 1, 2]), "steps": 20, **arguments}
    with pytest.raises(UserInputError, match=culprit):
        sample(arbitrary_model(diffusion), diffusion, (3, 2, 4, 4), **settings, generator=seeded())


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_model_and_diffusion_must_agree_on_the_variance(method: str) -> None:
    model = arbitrary_model(GaussianDiffusion(DiffusionConfig(variance="fixed_large")))
    with pytest.raises(ValueError, match="learn_sigma"):
        sample(
            model,
            GaussianDiffusion(DiffusionConfig()),
            (3, 2, 4, 4),
            y=torch.tensor([0, 1, 2]),
            method=method,
            generator=seeded(),
        )
