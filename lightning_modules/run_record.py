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
from lightning_modules.masks import MaskConfig
from lightning_modules.probes.gradient_conflict import GradientConflictProbe
from lightning_modules.tracking import records
from lightning_modules.tracking.callback import writer_of

if TYPE_CHECKING:
    from lightning_modules.backbones.backbone import Backbone
    from lightning_modules.backbones.dit import DiTConfig
    from lightning_modules.backbones.unet_config import UNetConfig

RESUME_KEY = "dtr_resume"
"""Where a checkpoint keeps `resume_settings`."""

_ROUTING_NAMES = {
    "dtr": "Denoising Task Routing (DTR)",
    "random": "Random routing (R-TR)",
    "cluster": "Cluster masks",
    "learned": "Learned masks",
}


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

    Learned masks are written again with each checkpoint and at the end, in place of the ones before. They are those of
    the trained weights, which the probes measure, not of their average.

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
        if pl_module.backbone.routing is not None:
            writer.log_file(records.MASKS_PATH, mask_file(pl_module.backbone))
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

    def on_train_end(self, trainer: pl.Trainer, pl_module: DenoiserModule) -> None:
        """Replaces the masks if training has changed them."""
        self._write_learned_masks(trainer, pl_module)

    def _write_learned_masks(self, trainer: pl.Trainer, pl_module: DenoiserModule) -> None:
        writer, routing = writer_of(trainer), pl_module.backbone.routing
        if writer is not None and routing is not None and routing.is_learned:
            writer.log_file(records.MASKS_PATH, mask_file(pl_module.backbone))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: DenoiserModule, checkpoint: dict[str, Any]) -> None:
        """Notes what a resumed run must not change; the run's masks become those of the checkpoint."""
        self._write_learned_masks(trainer, pl_module)
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


def mask_file(backbone: Backbone) -> bytes:
    """The masks of a routed backbone as they are now, as `records.MASKS_PATH` holds them."""
    assert backbone.routing is not None
    masks = {name: backbone.routing.block_masks(index) for index, name in enumerate(backbone.block_channels)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **masks)  # type: ignore[arg-type]
    return buffer.getvalue()


def describe(manifest: records.RunManifest, trainer: pl.Trainer) -> str:
    """The run in words (Markdown), for the description on its page in the MLflow UI."""
    routing = None if manifest.routing is None else MaskConfig(**manifest.routing)
    name = "Plain denoiser" if routing is None else _ROUTING_NAMES[routing.kind]
    tag = f", compared as `{manifest.method}`" if "+" in manifest.method else ""
    lines = [
        f"**{name}**{tag}, {manifest.parameters:,} parameters, on {manifest.dataset}, seed {manifest.seed}.",
        "",
    ]
    if routing is not None:
        lines += [_routing_in_words(routing), ""]
    lines += [
        f"Target {manifest.target}, loss weight {manifest.loss_weight}, {trainer.max_steps:,} steps of "
        f"{manifest.batch_size} images, T = {manifest.num_timesteps} in {len(manifest.interval_bounds) - 1} "
        f"intervals ({manifest.interval_spacing}).",
        "",
        "Charts: `loss/val` is the unweighted error on held-out images at fixed noise, `loss/val_t…` the same per "
        "timestep interval. Images: `conflict_cosine` (gradient cosine between intervals), `samples`.",
    ]
    return "\n".join(lines)


def _routing_in_words(config: MaskConfig) -> str:
    """A sentence on which channels each timestep uses."""
    clusters = (
        f"each of {config.num_clusters} clusters of timesteps"
        if config.cluster_bounds is None
        else f"each cluster of timesteps (bounds {', '.join(map(str, config.cluster_bounds))})"
    )
    masks = {
        "dtr": f"a window that slides with alpha = {config.alpha}",
        "random": "a random subset per timestep",
        "cluster": f"common ones, and others of its own for {clusters}",
        "learned": f"a subset for {clusters}, learned by a straight-through estimator",
    }[config.kind]
    last = "" if config.beta_last is None else f" ({config.beta_last} in the last block, linear in between)"
    own = ", in an order of channels of each block's own" if config.per_block else ""
    return f"Each timestep uses beta = {config.beta} of every block's channels{last}: {masks}{own}."


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
