"""What plain and routed denoisers share: training and validation, as a Lightning module."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbones.dit import DiTConfig
from lightning_modules.backbones.unet_config import UNetConfig
from lightning_modules.balancing.balancer import Request, Situation
from lightning_modules.balancing.build import build_balancer
from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.config import IntervalConfig, OptimizationConfig, ValidationConfig
from lightning_modules.diffusion import DiffusionConfig
from lightning_modules.ema import averaged_copy
from lightning_modules.errors import UserInputError
from lightning_modules.loss_weights import LossWeightConfig
from lightning_modules.method_tag import method_tag
from lightning_modules.moments import add_moments, interval_means
from lightning_modules.objective import BALANCING_STREAM, VALIDATION_STREAM, DenoisingObjective, NoisedBatch
from lightning_modules.optimization import build_optimizer
from lightning_modules.routing import MaskConfig
from lightning_modules.samplers import SamplerConfig
from lightning_modules.schedule import completes_step, loss_scale

BALANCING_KEY = "dtr_balancing"
"""Where a checkpoint keeps the state of the balancing method."""


class DenoiserModule(DenoisingObjective):
    """Training and validation that plain and routed denoisers share; see `BaselineModule` and `DTRModule`.

    Raises:
        UserInputError: If the parts do not fit together.
    """

    def __init__(
        self,
        backbone: DiTConfig | UNetConfig,
        # Not called routing: the parser hands defaults over to derived classes by name, and DTRModule's is not None.
        routing_config: MaskConfig | None,
        diffusion: DiffusionConfig,
        loss_weight: LossWeightConfig,
        intervals: IntervalConfig,
        sampler: SamplerConfig,
        balancing: BalancingConfig,
        optimization: OptimizationConfig,
        validation: ValidationConfig,
        seed: int,
    ) -> None:
        super().__init__(backbone, routing_config, diffusion, loss_weight, intervals, sampler, validation, seed)
        if intervals.only is not None and balancing.method != "none":
            raise UserInputError(
                f"intervals.only trains one task, so that balancing.method {balancing.method} has nothing to balance: "
                "set it to none"
            )
        if self.intervals.num_intervals < 2 and balancing.method != "none":
            raise UserInputError(
                f"balancing.method {balancing.method} needs two tasks or more: raise intervals.num_intervals"
            )
        self.save_hyperparameters(
            {
                "class": type(self).__name__,
                "backbone": dataclasses.asdict(backbone),
                "diffusion": dataclasses.asdict(diffusion),
                "loss_weight": dataclasses.asdict(loss_weight),
                "intervals": dataclasses.asdict(intervals),
                "sampler": dataclasses.asdict(sampler),
                "balancing": dataclasses.asdict(balancing),
                "optimization": dataclasses.asdict(optimization),
                "validation": dataclasses.asdict(validation),
                "seed": seed,
                **({} if routing_config is None else {"routing": dataclasses.asdict(routing_config)}),
            },
            logger=False,
        )
        self.balancing = balancing
        self.optimization = optimization
        self.ema = averaged_copy(self.backbone, optimization.ema_decay)
        trained = sum(parameter.numel() for parameter in self.backbone.parameters() if parameter.requires_grad)
        self.balancer = build_balancer(balancing, self.intervals.num_intervals, trained)
        self.gramian_request: Request | None = None
        self._drawn: NoisedBatch | None = None
        self._importance = torch.ones(())
        self._recent_losses: list[Tensor] = []
        self.validation_moments = torch.zeros(0)

    @property
    def method(self) -> str:
        """Routing and optimisation, see `method_tag`."""
        return method_tag(self.routing_config, self.loss_weight, self.balancing, self.sampler_config)

    def configure_model(self) -> None:
        """Compiles in place, which leaves the state dict's keys as they are. The averaged copy stays eager."""
        if self.optimization.compile:
            self.backbone.compile()

    def configure_optimizers(self) -> Any:
        """AdamW with an optional linear warm-up; learned loss weights have a learning rate of their own."""
        extra: list[tuple[torch.nn.Module, float]] = [(self.balancer, self.balancing.learning_rate)]
        if self.uncertainty is not None:
            extra.append((self.uncertainty, self.loss_weight.edm2_learning_rate))
        return build_optimizer(self.backbone, self.optimization, extra)

    def _situation(self, t: Tensor, batch_idx: int) -> Situation:
        task = self.intervals.task_of(t)
        if self._trainer is None:  # a step outside a training, as a test takes it
            return Situation(task, batch_idx, entropy=(self.seed, BALANCING_STREAM, batch_idx))
        return Situation(
            task,
            self.trainer.global_step,
            first_batch=batch_idx % self.trainer.accumulate_grad_batches == 0,
            entropy=(self.seed, BALANCING_STREAM, batch_idx),
            loss_scale=loss_scale(self.trainer),
            request=self.gramian_request,
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        """One step's loss, and per sample what the probes want: t, the loss before importance weighting, its parts."""
        drawn = self._drawn = self.draw(batch, batch_idx)
        with self.balancer.watch(self.backbone, self._situation(drawn.t, batch_idx)) as balanced:
            losses = self.losses_with_dropout(drawn, batch_idx)
            importance = self._importance = self.importance(drawn.t)
            weighted = losses.loss * importance
            loss = balanced(weighted)
        self._log_recent(weighted.detach().mean(), batch_idx)
        learned = self.uncertainty_loss(losses, drawn.t)
        if learned is not None:
            loss = loss + (learned * importance).mean()
        measured = self.measured_losses(losses, drawn.t).detach()
        if self.sampler.observes_losses:
            t, seen = drawn.t, losses.loss.detach()
            if self._trainer is not None:
                t, seen = self.all_gather((t, seen))  # (processes, B), or (B,) of the only one
            self.sampler.observe_losses(t.flatten(), seen.flatten())
        vb = None if losses.vb is None else losses.vb.detach()
        return {"loss": loss, "t": drawn.t, "sample_loss": measured, "mse": losses.mse.detach(), "vb": vb}

    def _log_recent(self, loss: Tensor, batch_idx: int) -> None:
        """Logs the mean training loss, unbalanced, since the last logged step: a single small batch says little."""
        self._recent_losses.append(loss)
        if self._trainer is None:
            return
        if completes_step(self.trainer, batch_idx) and self._logs_next_step():
            self.log("loss/train", torch.stack(self._recent_losses).mean(), sync_dist=True)
            # Lightning would name the step after the batch before this one; the house counts completed steps.
            self.log("step", float(self.trainer.global_step + 1), sync_dist=True)
            self._recent_losses.clear()

    def _logs_next_step(self) -> bool:
        return (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the norm of the gradient before it is clipped."""
        if self._logs_next_step():
            gradients = [p.grad for p in self.backbone.parameters() if p.grad is not None]
            self.log("optim/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, then lets the average follow and the balancing method see what the step did."""
        super().optimizer_step(*args, **kwargs)
        self.ema.update_parameters(self.backbone)
        batch_idx, drawn = int(args[1] if len(args) > 1 else kwargs["batch_idx"]), self._drawn

        def losses_now() -> Tensor:
            assert drawn is not None
            with self.trainer.precision_plugin.forward_context(), torch.no_grad():
                return self.losses_with_dropout(drawn, batch_idx).loss * self._importance

        self.balancer.after_step(self.trainer.global_step + 1, losses_now)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the trainer is asked to; learned loss weights neither count in the norm nor are they clipped."""
        if len(optimizer.param_groups) == 1:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.backbone.parameters(), gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the balancing method remembers."""
        checkpoint[BALANCING_KEY] = self.balancer.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lets the balancing method go on from there."""
        if BALANCING_KEY in checkpoint:  # older ones trained plainly
            self.balancer.load_state(checkpoint[BALANCING_KEY])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Asks to stop at the last step: Lightning then validates once more, whatever the validation interval."""
        if self.trainer.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True

    def on_validation_epoch_start(self) -> None:
        """Clears the moments: rows count, sum and sum of squares of mse, then of vb, per timestep."""
        self.validation_moments = torch.zeros(
            (2, 3, self.diffusion.num_timesteps), dtype=torch.float64, device=self.device
        )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Losses of the averaged weights on held-out images, at t and noise that are the same in every run."""
        images, labels = batch
        y = labels if self.backbone.config.num_classes > 0 else None
        for repeat in range(self.validation.repeats):
            generator = self.generator(VALIDATION_STREAM, batch_idx * self.validation.repeats + repeat)
            t = self.intervals.sample_stratified(len(images), generator)
            noise = torch.randn(images.shape, generator=generator, device=self.device, dtype=images.dtype)
            losses = self.sample_losses(NoisedBatch(images, y, t, noise), self.ema.module)
            add_moments(self.validation_moments[0], t, losses.mse)
            if losses.vb is not None:
                add_moments(self.validation_moments[1], t, losses.vb)

    def on_validation_epoch_end(self) -> None:
        """Logs the mean over timesteps, and the mean per interval, each interval weighing by its width."""
        metrics = interval_means(self.validation_moments[0], self.intervals, "loss/val")
        if self.diffusion.config.variance == "learned_range":
            metrics["loss/val_vb"] = interval_means(self.validation_moments[1], self.intervals, "loss/val")["loss/val"]
        self.log_dict({**metrics, "step": float(self.trainer.global_step)}, sync_dist=True)
