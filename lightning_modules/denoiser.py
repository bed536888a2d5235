"""The models that are trained: a plain denoiser and a routed one, as Lightning modules."""

from __future__ import annotations

from lightning_modules.backbones.dit import DiTConfig
from lightning_modules.backbones.unet_config import UNetConfig
from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.config import IntervalConfig, OptimizationConfig, ValidationConfig
from lightning_modules.denoiser_base import DenoiserModule
from lightning_modules.diffusion import DiffusionConfig
from lightning_modules.loss_weights import LossWeightConfig
from lightning_modules.objective import NoisedBatch, SampleLosses
from lightning_modules.routing import MaskConfig
from lightning_modules.samplers import SamplerConfig

__all__ = ["BaselineModule", "DTRModule", "DenoiserModule", "NoisedBatch", "SampleLosses"]


class BaselineModule(DenoiserModule):
    """A plain denoiser: all timesteps share all channels.

    Args:
        backbone: The network, a DiT or a U-Net; its ``learn_sigma`` must agree with ``diffusion.variance``.
        diffusion: Noise schedule, prediction target, variance.
        loss_weight: Weight of a sample's squared error by its SNR.
        intervals: The tasks.
        sampler: Which timesteps training draws.
        balancing: Multi-task method that combines the tasks' losses or gradients.
        optimization: Optimizer and weight average.
        validation: The fixed measurement.
        seed: Seed of initialisation, t, noise and label dropout. Runs with one seed share all of these.
    """

    def __init__(
        self,
        backbone: DiTConfig | UNetConfig,
        diffusion: DiffusionConfig = DiffusionConfig(),  # noqa: B008  (frozen)
        loss_weight: LossWeightConfig = LossWeightConfig(),  # noqa: B008
        intervals: IntervalConfig = IntervalConfig(),  # noqa: B008
        sampler: SamplerConfig = SamplerConfig(),  # noqa: B008
        balancing: BalancingConfig = BalancingConfig(),  # noqa: B008
        optimization: OptimizationConfig = OptimizationConfig(),  # noqa: B008
        validation: ValidationConfig = ValidationConfig(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone, None, diffusion, loss_weight, intervals, sampler, balancing, optimization, validation, seed
        )


class DTRModule(DenoiserModule):
    """A denoiser whose residual blocks are routed: DTR's sliding window, its control, or other masks to compare with.

    Args:
        backbone: See `BaselineModule`, as for every other argument but ``routing``.
        routing: Which channels each timestep uses.
        diffusion: Noise schedule, prediction target, variance.
        loss_weight: Weight of a sample's squared error by its SNR.
        intervals: The tasks.
        sampler: Which timesteps training draws.
        balancing: Multi-task method that combines the tasks' losses or gradients.
        optimization: Optimizer and weight average.
        validation: The fixed measurement.
        seed: Seed of initialisation, t, noise and label dropout; masks have their own, ``routing.seed``.
    """

    def __init__(
        self,
        backbone: DiTConfig | UNetConfig,
        routing: MaskConfig = MaskConfig(),  # noqa: B008  (frozen)
        diffusion: DiffusionConfig = DiffusionConfig(),  # noqa: B008
        loss_weight: LossWeightConfig = LossWeightConfig(),  # noqa: B008
        intervals: IntervalConfig = IntervalConfig(),  # noqa: B008
        sampler: SamplerConfig = SamplerConfig(),  # noqa: B008
        balancing: BalancingConfig = BalancingConfig(),  # noqa: B008
        optimization: OptimizationConfig = OptimizationConfig(),  # noqa: B008
        validation: ValidationConfig = ValidationConfig(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone, routing, diffusion, loss_weight, intervals, sampler, balancing, optimization, validation, seed
        )
