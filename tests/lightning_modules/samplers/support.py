"""What the tests of the samplers share: schedules, tasks, frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.noise_schedules import NoiseSchedule
from lightning_modules.samplers import SamplerConfig, TimestepSampler, build_sampler
from lightning_modules.timesteps import TimestepIntervals

INTERVALS = TimestepIntervals.explicit([0, 3, 10, 12, 40])


def log_snr(num_timesteps: int = 40, schedule: str = "linear") -> Tensor:
    return torch.from_numpy(NoiseSchedule.named(schedule, num_timesteps).snr).log()


def build(name: str, intervals: TimestepIntervals = INTERVALS, **settings) -> TimestepSampler:
    return build_sampler(SamplerConfig(name, **settings), intervals, log_snr(intervals.num_timesteps))


def informed(name: str, **settings) -> TimestepSampler:
    """A sampler that has seen whatever it learns from, so that its distribution is far from uniform."""
    sampler = build(name, **settings)
    generator = torch.Generator().manual_seed(5)
    t = torch.arange(40).repeat(12)
    sampler.observe_losses(t, torch.rand(480, generator=generator) * (1 + t))
    rows = torch.randn(8, 30, generator=generator, dtype=torch.float64) * torch.arange(1, 9)[:, None]
    sampler.observe_gradients(rows @ rows.T, torch.full((8,), 4), 2)
    return sampler


def frequencies(sampler: TimestepSampler, count: int, draws: int, seed: int = 0) -> Tensor:
    """How often each timestep was drawn, (T,)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.cat([sampler.sample(count, generator) for _ in range(draws)])
    return torch.bincount(drawn, minlength=sampler.intervals.num_timesteps)
