"""Gaussian diffusion: noising, training targets, per-sample losses and the reverse step's distribution.

Sources: DDPM (Ho et al., 2020, arXiv 2006.11239); improved DDPM (Nichol & Dhariwal, 2021, arXiv 2102.09672) for the
learned variance and its variational term; progressive distillation (Salimans & Ho, 2022, arXiv 2202.00512) for v.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_modules.errors import UserInputError
from lightning_modules.noise_schedules import NoiseSchedule, ScheduleName

Target = Literal["epsilon", "x0", "v"]
VarianceKind = Literal["fixed_small", "fixed_large", "learned_range"]


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """What defines a diffusion.

    Attributes:
        schedule: Noise schedule.
        num_timesteps: T.
        target: What the network predicts: the noise, the clean data, or ``v = sqrt(abar) eps - sqrt(1 - abar) x_0``.
        variance: Variance of the reverse step: the posterior's (``fixed_small``), beta (``fixed_large``), or predicted
            between the two by C further output channels (``learned_range``; improved DDPM, equation 15).

    Raises:
        UserInputError: For an unknown choice, or T < 2.
    """

    schedule: ScheduleName = "linear"
    num_timesteps: int = 1000
    target: Target = "epsilon"
    variance: VarianceKind = "learned_range"

    def __post_init__(self) -> None:
        choices = {"schedule": ScheduleName, "target": Target, "variance": VarianceKind}
        for field, allowed in choices.items():
            if getattr(self, field) not in get_args(allowed):
                options = ", ".join(get_args(allowed))
                raise UserInputError(f"diffusion {field} is {getattr(self, field)!r}: choose one of {options}")
        if self.num_timesteps < 2:
            raise UserInputError(f"num_timesteps is {self.num_timesteps}: a diffusion needs at least 2 timesteps")


class DenoisingLoss(NamedTuple):
    """The two terms of the training loss, per sample.

    Attributes:
        mse: Mean squared error of the target, averaged over a sample's elements, shape ``(B,)``.
        vb: Variational term in bits per dimension, shape ``(B,)``; None where the variance is fixed.
    """

    mse: Tensor
    vb: Tensor | None


class Posterior(NamedTuple):
    """The Gaussian ``p(x_{t-1} | x_t)`` of the reverse step; each tensor has the shape of ``x_t``, ``(B, C, H, W)``."""

    mean: Tensor
    log_variance: Tensor
    pred_x0: Tensor


class GaussianDiffusion(nn.Module):
    """Diffusion with T discrete timesteps; holds coefficients only, no parameters.

    Coefficients are computed in float64 and stored in float32 (as DiT's code rounds them), as non-persistent buffers;
    type promotion lifts them to float64 inputs. Half-precision model outputs are lifted to float32 in the same way.
    """

    snr: Tensor
    log_snr: Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.num_timesteps = config.num_timesteps
        schedule = NoiseSchedule.named(config.schedule, config.num_timesteps)
        self.schedule = schedule
        signal = schedule.alphas_cumprod
        coefficients = {
            "snr": schedule.snr,
            "log_snr": np.log(schedule.snr),
            "signal_scale": np.sqrt(signal),
            "noise_scale": np.sqrt(1 - signal),
            "x0_from_xt": np.sqrt(1 / signal),
            "x0_from_epsilon": np.sqrt(1 / signal - 1),
            "mean_x0": schedule.posterior_mean_x0,
            "mean_xt": schedule.posterior_mean_xt,
            "log_variance_small": schedule.posterior_log_variance,
            "log_variance_large": schedule.large_log_variance,
            "log_beta": np.log(schedule.betas),
        }
        for name, values in coefficients.items():
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32), persistent=False)

    def _at(self, coefficient: str, t: Tensor, ndim: int) -> Tensor:
        """A coefficient at timesteps ``t`` (B,), shaped ``(B, 1, ..., 1)``."""
        return self.get_buffer(coefficient)[t].reshape(-1, *[1] * (ndim - 1))

    def output_channels(self, in_channels: int) -> int:
        """Number of channels the network must put out for data of ``in_channels`` channels."""
        return in_channels * (2 if self.config.variance == "learned_range" else 1)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draws ``x_t`` from ``q(x_t | x_0)`` with the given noise (DDPM, equation 4).

        Args:
            x0: Clean data ``(B, C, H, W)``.
            t: Timesteps ``(B,)``, integers in ``[0, T)``.
            noise: Standard normal noise ``(B, C, H, W)``.

        Returns:
            Noised data ``(B, C, H, W)``.
        """
        return self._at("signal_scale", t, x0.ndim) * x0 + self._at("noise_scale", t, x0.ndim) * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict, shape ``(B, C, H, W)``; arguments as in `q_sample`."""
        if self.config.target == "epsilon":
            return noise
        if self.config.target == "x0":
            return x0
        return self._at("signal_scale", t, x0.ndim) * noise - self._at("noise_scale", t, x0.ndim) * x0

    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean data that a prediction of the configured target implies.

        Args:
            prediction: Predicted target ``(B, C, H, W)``, without variance channels.
            x_t: Noised data ``(B, C, H, W)``.
            t: Timesteps ``(B,)``.

        Returns:
            Predicted ``x_0`` of shape ``(B, C, H, W)``.
        """
        if self.config.target == "x0":
            return prediction
        if self.config.target == "v":
            return self._at("signal_scale", t, x_t.ndim) * x_t - self._at("noise_scale", t, x_t.ndim) * prediction
        return self._at("x0_from_xt", t, x_t.ndim) * x_t - self._at("x0_from_epsilon", t, x_t.ndim) * prediction

    def predict_epsilon(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction of the configured target implies; arguments as in `predict_x0`."""
        if self.config.target == "epsilon":
            return prediction
        signal, noise = self._at("signal_scale", t, x_t.ndim), self._at("noise_scale", t, x_t.ndim)
        if self.config.target == "v":
            return noise * x_t + signal * prediction
        return (x_t - signal * prediction) / noise

    def predict_v(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The v that a prediction of the configured target implies; arguments as in `predict_x0`."""
        if self.config.target == "v":
            return prediction
        signal, noise = self._at("signal_scale", t, x_t.ndim), self._at("noise_scale", t, x_t.ndim)
        if self.config.target == "epsilon":
            return (prediction - noise * x_t) / signal
        return (signal * x_t - prediction) / noise

    def split_output(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """Splits the network's output into the predicted target and the variance interpolation.

        Args:
            output: Network output ``(B, C or 2C, H, W)``.
            channels: C.

        Returns:
            Predicted target ``(B, C, H, W)`` and variance values ``(B, C, H, W)`` (-1: small, 1: large), or None
            for these where the variance is fixed.

        Raises:
            ValueError: If the output has another number of channels than the variance kind asks for.
        """
        expected = self.output_channels(channels)
        if output.shape[1] != expected:
            raise ValueError(
                f"the network put out {output.shape[1]} channels, variance {self.config.variance!r} needs {expected}: "
                "make the backbone's learn_sigma agree with the diffusion's variance"
            )
        if expected == channels:
            return output, None
        prediction, variance_values = output.chunk(2, dim=1)
        return prediction, variance_values

    def p_mean_variance(self, output: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = False) -> Posterior:
        """The reverse step's distribution ``p(x_{t-1} | x_t)`` that a network output implies.

        Args:
            output: Network output ``(B, C or 2C, H, W)``.
            x_t: Noised data ``(B, C, H, W)``.
            t: Timesteps ``(B,)``.
            clip_denoised: Whether to clip the predicted clean data to ``[-1, 1]`` (pixels, not latents).

        Returns:
            Mean, log-variance and predicted clean data, each ``(B, C, H, W)``.

        Raises:
            ValueError: If the output has the wrong number of channels.
        """
        prediction, variance_values = self.split_output(output, x_t.shape[1])
        pred_x0 = self.predict_x0(prediction, x_t, t)
        if clip_denoised:
            pred_x0 = pred_x0.clamp(-1, 1)
        mean = self._posterior_mean(pred_x0, x_t, t)
        return Posterior(mean, self._log_variance(variance_values, t, mean), pred_x0)

    def losses(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> DenoisingLoss:
        """Training losses per sample, neither weighted nor reduced.

        The variational term only trains the variance: the predicted mean is detached in it, as in improved DDPM,
        and it is not rescaled (DiT adds it to the mean squared error as it is).

        Args:
            output: Network output ``(B, C or 2C, H, W)`` for ``x_t`` and ``t``.
            x0: Clean data ``(B, C, H, W)``.
            x_t: Noised data ``(B, C, H, W)``.
            t: Timesteps ``(B,)``.
            noise: The noise in ``x_t``, ``(B, C, H, W)``.

        Returns:
            Both terms, each ``(B,)``.

        Raises:
            ValueError: If the output has the wrong number of channels.
        """
        prediction, variance_values = self.split_output(output, x_t.shape[1])
        mse = (self.target(x0, noise, t) - prediction).square().flatten(1).mean(1)
        if variance_values is None:
            return DenoisingLoss(mse, None)
        frozen = torch.cat([prediction.detach(), variance_values], dim=1)
        return DenoisingLoss(mse, self._variational_term(self.p_mean_variance(frozen, x_t, t), x0, x_t, t))

    def _posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of ``q(x_{t-1} | x_t, x_0)`` (DDPM, equation 7)."""
        return self._at("mean_x0", t, x_t.ndim) * x0 + self._at("mean_xt", t, x_t.ndim) * x_t

    def _log_variance(self, variance_values: Tensor | None, t: Tensor, like: Tensor) -> Tensor:
        """Log-variance of the reverse step, with the shape and type of ``like`` (B, C, H, W)."""
        if variance_values is None:
            kind = "log_variance_small" if self.config.variance == "fixed_small" else "log_variance_large"
            return self._at(kind, t, like.ndim).to(like.dtype).expand_as(like)
        low, high = self._at("log_variance_small", t, like.ndim), self._at("log_beta", t, like.ndim)
        share = (variance_values + 1) / 2
        return share * high + (1 - share) * low

    def _variational_term(self, predicted: Posterior, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``KL(q(x_{t-1} | x_t, x_0) || p)``, or the decoder's ``-log p(x_0 | x_1)`` at t = 0; bits/dimension, (B,)."""
        true_mean = self._posterior_mean(x0, x_t, t)
        true_log_variance = self._at("log_variance_small", t, x_t.ndim)
        kl = gaussian_kl(true_mean, true_log_variance, predicted.mean, predicted.log_variance)
        decoder = -discretized_gaussian_log_likelihood(x0, predicted.mean, predicted.log_variance)
        at_start = (t == 0).reshape(-1, *[1] * (x_t.ndim - 1))
        return torch.where(at_start, decoder, kl).flatten(1).mean(1) / math.log(2.0)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """``KL(N(mean, exp(log_variance)) || N(other_mean, exp(other_log_variance)))`` per element, in nats."""
    log_ratio = log_variance - other_log_variance
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (log_ratio.exp() + distance - 1 - log_ratio)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability of 8-bit data under a Gaussian integrated over each value's bin (DDPM, equation 13).

    The normal distribution function is approximated by a tanh, as in improved DDPM.

    Args:
        x: Data in ``[-1, 1]`` whose 256 values lie 2 / 255 apart; the outermost bins reach to infinity.
        mean: Means, of the shape of ``x``.
        log_variance: Log-variances, of the shape of ``x``.

    Returns:
        Log-probabilities in nats, of the shape of ``x``; bounded below by ``log(1e-12)``.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = _normal_cdf(inverse_std * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse_std * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """Tanh approximation of the standard normal distribution function (Page, 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
