"""Callback: writes down what a run is, so that it can be read without the training code."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytorch_lightning as pl

from lightning_modules.backbones.cost import flops_per_sample
from lightning_modules.data.images import ImageData
from lightning_modules.denoiser import DenoiserModule
from lightning_modules.probes.gradient_conflict import GradientConflictProbe
from lightning_modules.tracking import records
from lightning_modules.tracking.callback import writer_of

if TYPE_CHECKING:
    from lightning_modules.backbones.dit import DiTConfig
    from lightning_modules.backbones.unet_config import UNetConfig

RESUME_KEY = "dtr_resume"
"""Where a checkpoint keeps `resume_settings`."""


def resume_settings(trainer: pl.Trainer, data: ImageData) -> dict[str, Any]:
    """What, besides the model's own settings, must stay the same when a run is resumed.

    The place in the data follows from the step and these; Gramians of different halves do not fit one table.
    """
    halves = [callback.halves for callback in _callbacks(trainer) if isinstance(callback, GradientConflictProbe)]
    return {
        "data": data.name,
        "batch_size": data.batch_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "halves": halves[0] if halves else None,
    }


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


class RunRecord(pl.Callback):
    """At the start of training: the manifest, the channel masks, the parameters, and tags to find the run by.

    Args:
        data: The data module that feeds the run.
    """

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def on_train_start(self, trainer: pl.Trainer, pl_module: DenoiserModule) -> None:
        """Writes everything; a resumed run writes the same again."""
        writer = writer_of(trainer)
        if writer is None:
            return
        manifest = run_manifest(pl_module, self.data, trainer)
        writer.log_file(records.MANIFEST_PATH, manifest.to_json())
        routing = pl_module.backbone.routing
        if routing is not None:
            masks = {name: routing.block_masks(index) for index, name in enumerate(manifest.block_channels)}
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **masks)  # type: ignore[arg-type]
            writer.log_file(records.MASKS_PATH, buffer.getvalue())
        writer.log_params(
            _flat({**dict(pl_module.hparams), "data": self.data.name, "batch_size": self.data.batch_size})
        )
        writer.set_tags(
            {
                records.TAG_KIND: records.KIND_TRAINING if manifest.trained_task is None else records.KIND_SPECIALIST,
                records.TAG_METHOD: manifest.method,
                records.TAG_SEED: str(manifest.seed),
                records.TAG_DATASET: manifest.dataset,
                "mlflow.note.content": describe(manifest, trainer),
            }
        )

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: DenoiserModule, checkpoint: dict[str, Any]) -> None:
        """Notes what a resumed run must not change."""
        checkpoint[RESUME_KEY] = resume_settings(trainer, self.data)


def run_manifest(module: DenoiserModule, data: ImageData, trainer: pl.Trainer) -> records.RunManifest:
    """The manifest of a run."""
    routing = module.hparams.get("routing")
    backbone = module.backbone
    return records.RunManifest(
        method=module.method,
        seed=module.seed,
        num_timesteps=module.diffusion.num_timesteps,
        interval_bounds=list(module.intervals.bounds),
        interval_spacing=module.intervals.spacing,
        log_snr=[round(float(value), 6) for value in module.diffusion.log_snr],
        target=module.diffusion.config.target,
        loss_weight=module.loss_weight.name,
        batch_size=data.batch_size * trainer.accumulate_grad_batches,
        block_channels=backbone.block_channels,
        routing=None if routing is None else dict(routing),
        parameters=sum(p.numel() for p in backbone.parameters() if p.requires_grad),
        dataset=data.name,
        learning_rate=module.optimization.learning_rate,
        flops_per_sample=flops_per_sample(cast("DiTConfig | UNetConfig", backbone.config)),
        trained_task=module.interval_config.only,
    )


def describe(manifest: records.RunManifest, trainer: pl.Trainer) -> str:
    """The run in words (Markdown), for the description on its page in the MLflow UI."""
    names = {"baseline": "Plain denoiser", "dtr": "Denoising Task Routing (DTR)", "random": "Random routing (R-TR)"}
    lines = [
        f"**{names[manifest.method]}**, {manifest.parameters:,} parameters, on {manifest.dataset}, "
        f"seed {manifest.seed}.",
        "",
    ]
    if manifest.routing is not None:
        beta, alpha = manifest.routing["beta"], manifest.routing["alpha"]
        shape = (
            f"a window that slides with alpha = {alpha}" if manifest.method == "dtr" else "a random subset per timestep"
        )
        lines += [f"Each timestep uses beta = {beta} of every block's channels: {shape}.", ""]
    lines += [
        f"Target {manifest.target}, loss weight {manifest.loss_weight}, {trainer.max_steps:,} steps of "
        f"{manifest.batch_size} images, T = {manifest.num_timesteps} in {len(manifest.interval_bounds) - 1} "
        f"intervals ({manifest.interval_spacing}).",
        "",
        "Charts: `loss/val` is the unweighted error on held-out images at fixed noise, `loss/val_t…` the same per "
        "timestep interval. Images: `conflict_cosine` (gradient cosine between intervals), `samples`.",
    ]
    return "\n".join(lines)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as dotted names; lists as JSON, and None as the word."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif isinstance(value, str | int | float):
            flat[prefix + key] = value
        else:
            flat[prefix + key] = json.dumps(value)
    return flat
