"""What is drawn and what is lost: the random part of a batch, and the losses of its samples."""

from __future__ import annotations

from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.backbones.build import build_backbone
from lightning_modules.backbones.dit import DiTConfig
from lightning_modules.backbones.unet_config import UNetConfig
from lightning_modules.config import IntervalConfig, ValidationConfig
from lightning_modules.diffusion import DiffusionConfig, GaussianDiffusion
from lightning_modules.errors import UserInputError
from lightning_modules.loss_weights import LossWeightConfig, timestep_weights
from lightning_modules.routing import MaskConfig, route
from lightning_modules.samplers import SamplerConfig, build_sampler
from lightning_modules.seeding import seeded_dropout, seeded_generator
from lightning_modules.uncertainty import LogSnrUncertainty

# 3 is that of `uncertainty`.
TRAIN_STREAM, VALIDATION_STREAM, DROPOUT_STREAM, BALANCING_STREAM = 0, 1, 2, 4


class NoisedBatch(NamedTuple):
    """Everything random about one batch, drawn once, so that a step can be repeated exactly."""

    x0: Tensor  # (B, C, H, W) in [-1, 1]
    y: Tensor | None  # (B,) labels after label dropout; None if unconditional
    t: Tensor  # (B,) timesteps
    noise: Tensor  # (B, C, H, W) standard normal


class SampleLosses(NamedTuple):
    """Losses per sample, shape (B,)."""

    loss: Tensor  # what training minimises: weighted mse + vb
    mse: Tensor  # unweighted
    vb: Tensor | None  # variational bound in bits per dimension, if the variance is learned


class DenoisingObjective(pl.LightningModule):
    """The backbone, the tasks, and the loss of a noised sample; `DenoiserModule` trains it.

    Args:
        backbone: The network.
        routing: Its masks, or None.
        diffusion: Noise schedule, prediction target, variance.
        loss_weight: Weight of a sample's squared error.
        intervals: The tasks.
        sampler: Which timesteps training draws.
        validation: The fixed measurement.
        seed: Of initialisation and draws.

    Raises:
        UserInputError: If the parts do not fit together.
    """

    timestep_weights: Tensor

    def __init__(
        self,
        backbone: DiTConfig | UNetConfig,
        routing: MaskConfig | None,
        diffusion: DiffusionConfig,
        loss_weight: LossWeightConfig,
        intervals: IntervalConfig,
        sampler: SamplerConfig,
        validation: ValidationConfig,
        seed: int,
    ) -> None:
        super().__init__()
        if backbone.learn_sigma != (diffusion.variance == "learned_range"):
            raise UserInputError(
                f"backbone.learn_sigma is {backbone.learn_sigma} but diffusion.variance is {diffusion.variance!r}: "
                "a learned variance needs both learn_sigma: true and variance: learned_range"
            )
        self.routing_config = routing
        self.interval_config = intervals
        self.sampler_config = sampler
        self.validation = validation
        self.seed = seed
        self.diffusion = GaussianDiffusion(diffusion)
        self.intervals = intervals.build(self.diffusion.log_snr)
        self.sampler = build_sampler(sampler, self.intervals, self.diffusion.log_snr)
        self.weigh_timesteps(loss_weight)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = build_backbone(backbone)
        if routing is not None:
            route(self.backbone, routing, self.diffusion.num_timesteps)

    def weigh_timesteps(self, loss_weight: LossWeightConfig) -> None:
        """Sets the weights of the squared error at each timestep, also in place of those the module was made with."""
        self.loss_weight = loss_weight
        self.register_buffer("timestep_weights", timestep_weights(loss_weight, self.diffusion), persistent=False)
        learned = loss_weight.name == "edm2"
        self.uncertainty = LogSnrUncertainty(loss_weight.edm2_channels, self.seed) if learned else None

    def generator(self, stream: int, batch_idx: int) -> torch.Generator:
        """A generator on the module's device whose state depends on seed, stream, process and batch alone."""
        seed = self.validation.seed if stream == VALIDATION_STREAM else self.seed
        rank = self.global_rank if stream == TRAIN_STREAM else 0
        return seeded_generator(seed, stream, rank, batch_idx, device=self.device)

    def draw_timesteps(self, count: int, batch_idx: int) -> Tensor:
        """The timesteps (B,) that `draw` gives a training batch of ``count`` images, without drawing the rest."""
        return self._sample(count, self.generator(TRAIN_STREAM, batch_idx))

    def _sample(self, count: int, generator: torch.Generator) -> Tensor:
        only = self.interval_config.only
        if only is not None:
            return self.intervals.sample_within(only, count, generator)
        return self.sampler.sample(count, generator)

    def draw(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> NoisedBatch:
        """The random part of training batch ``batch_idx``: the same whenever it is asked for."""
        images, labels = batch
        generator = self.generator(TRAIN_STREAM, batch_idx)
        t = self._sample(len(images), generator)
        noise = torch.randn(images.shape, generator=generator, device=self.device, dtype=images.dtype)
        conditional = self.backbone.config.num_classes > 0
        y = self.backbone.drop_labels(labels, generator) if conditional else None
        return NoisedBatch(images, y, t, noise)

    def sample_losses(self, batch: NoisedBatch, backbone: torch.nn.Module | None = None) -> SampleLosses:
        """Losses per sample, shape (B,), of the trained backbone or of the one given."""
        model = self.backbone if backbone is None else backbone
        x_t = self.diffusion.q_sample(batch.x0, batch.t, batch.noise)
        output = model(x_t, batch.t, batch.y)
        losses = self.diffusion.losses(output, batch.x0, x_t, batch.t, batch.noise)
        weight = self.timestep_weights[batch.t]
        if self.uncertainty is not None:
            with torch.no_grad():
                weight = torch.exp(-self.uncertainty(self.diffusion.log_snr[batch.t]))
        loss = weight.to(losses.mse.dtype) * losses.mse
        if losses.vb is not None:
            loss = loss + losses.vb
        return SampleLosses(loss, losses.mse, losses.vb)

    def step_losses(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[NoisedBatch, SampleLosses]:
        """What a training step draws, dropout included, and its losses: the same whenever it is asked for."""
        drawn = self.draw(batch, batch_idx)
        return drawn, self.losses_with_dropout(drawn, batch_idx)

    def losses_with_dropout(self, drawn: NoisedBatch, batch_idx: int) -> SampleLosses:
        """The losses of a training batch, with the dropout of that batch."""
        with seeded_dropout(self.backbone, self.seed, DROPOUT_STREAM, self.global_rank, batch_idx):
            return self.sample_losses(drawn)

    @property
    def weighs_samples(self) -> bool:
        """Whether the sampler's importance weights are part of the training loss."""
        return self.sampler.is_weighted and self.interval_config.only is None

    def measured_losses(self, losses: SampleLosses, t: Tensor) -> Tensor:
        """Losses (B,) whose mean over a task's samples estimates the task's loss, for probes."""
        varies = self.weighs_samples and self.sampler.varies_within
        return losses.loss * self.sampler.relative_importance(t) if varies else losses.loss

    def importance(self, t: Tensor) -> Tensor:
        """What training multiplies a sample's loss by, to estimate the mean over uniform t: shape of ``t``, or ()."""
        return self.sampler.importance(t) if self.weighs_samples else torch.ones((), device=t.device)

    def uncertainty_loss(self, losses: SampleLosses, t: Tensor) -> Tensor | None:
        """What trains EDM2's uncertainty (B,), and nothing else; None without one.

        A term of its own, so that multi-task methods and probes see the weighted losses alone.
        """
        if self.uncertainty is None:
            return None
        return self.uncertainty.loss(losses.mse.detach(), self.diffusion.log_snr[t])
