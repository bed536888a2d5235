"""Which timesteps training draws: one sampler per file, built by `build_sampler` from a `SamplerConfig`."""

from lightning_modules.samplers.base import TimestepSampler
from lightning_modules.samplers.build import build_sampler
from lightning_modules.samplers.config import SamplerConfig

__all__ = ["SamplerConfig", "TimestepSampler", "build_sampler"]
