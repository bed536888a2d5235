"""The sampler that a configuration names."""

from __future__ import annotations

from torch import Tensor

from lightning_modules.samplers.base import TimestepSampler
from lightning_modules.samplers.config import SamplerConfig
from lightning_modules.samplers.gradient_noise import GradientNoiseSampler
from lightning_modules.samplers.interval import StratifiedSampler, UniformSampler
from lightning_modules.samplers.log_normal import LogNormalSampler
from lightning_modules.samplers.loss_second_moment import LossSecondMomentSampler
from lightning_modules.samplers.speed import SpeedSampler
from lightning_modules.timesteps import TimestepIntervals


def build_sampler(config: SamplerConfig, intervals: TimestepIntervals, log_snr: Tensor) -> TimestepSampler:
    """The sampler of training's timesteps.

    Args:
        config: Which sampler, and its parameters.
        intervals: The tasks.
        log_snr: Log-SNR of each timestep (T,), strictly decreasing; the noise schedule, for samplers that need it.

    Raises:
        UserInputError: If the sampler does not fit the schedule.
        ValueError: If intervals and ``log_snr`` have different T.
    """
    if log_snr.shape != (intervals.num_timesteps,):
        raise ValueError(f"log_snr must have shape ({intervals.num_timesteps},), got {tuple(log_snr.shape)}")
    match config.name:
        case "stratified":
            return StratifiedSampler(intervals)
        case "uniform":
            return UniformSampler(intervals)
        case "log_normal":
            return LogNormalSampler(intervals, log_snr, config.log_normal_mean, config.log_normal_std)
        case "loss_second_moment":
            return LossSecondMomentSampler(
                intervals, config.loss_second_moment_history, config.loss_second_moment_uniform
            )
        case "gradient_noise":
            return GradientNoiseSampler(
                intervals, config.gradient_noise_decay, config.gradient_noise_floor, config.gradient_noise_moment
            )
        case "speed":
            return SpeedSampler(intervals, log_snr, config.speed_k, config.speed_tau, config.speed_magnitude)
