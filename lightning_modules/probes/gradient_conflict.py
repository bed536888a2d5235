"""Probe: inner products between the gradients of the tasks, per layer, on a schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.denoiser import DenoiserModule, NoisedBatch
from lightning_modules.errors import UserInputError
from lightning_modules.gradients.gramian import Gramian, gramian_by_subbatches, split_tasks
from lightning_modules.schedule import is_scheduled
from lightning_modules.tracking.callback import writer_of
from lightning_modules.tracking.heatmap import heatmap_image
from lightning_modules.tracking.records import GRADIENT_GRAMIAN, interval_labels


class GradientConflictProbe(pl.Callback):
    """Writes table `GRADIENT_GRAMIAN`, the scalars ``conflict/…`` and the heatmap ``conflict_cosine``.

    At a scheduled step it repeats the coming training step (same images, t and noise, same weights) group by group,
    before the optimizer moves.

    Args:
        every_n_steps: Measure in every n-th step; 0 turns the probe off.
        halves: Disjoint groups per task. Two or more make products free of sampling noise, at the same cost.
        max_heatmaps: At most this many heatmaps a run, evenly spaced: a slider with more is no easier to read, and
            an image costs the store more than all other rows of a measurement.
    """

    def __init__(self, every_n_steps: int = 200, halves: int = 2, max_heatmaps: int = 100) -> None:
        if every_n_steps < 0 or halves < 1 or max_heatmaps < 1:
            raise UserInputError(
                "gradient_conflict every_n_steps must not be negative (0: off), halves and max_heatmaps at least 1, "
                f"got {every_n_steps}, {halves} and {max_heatmaps}"
            )
        self.every_n_steps = every_n_steps
        self.halves = halves
        self.max_heatmaps = max_heatmaps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: DenoiserModule, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        """Measures in the steps that the schedule names, before the weights change."""
        if not is_scheduled(trainer, batch_idx, self.every_n_steps):
            return
        gramian = self.measure(trainer, pl_module, pl_module.draw(batch, batch_idx))
        self._write(trainer, pl_module, gramian)

    def measure(self, trainer: pl.Trainer, module: DenoiserModule, batch: NoisedBatch) -> Gramian:
        """The Gramian over ``K * halves`` groups; under several processes the mean of theirs."""
        num_groups = module.intervals.num_intervals * self.halves
        group = split_tasks(module.intervals.task_of(batch.t), module.intervals.num_intervals, self.halves)

        def sample_loss(rows: Tensor) -> Tensor:
            y = None if batch.y is None else batch.y[rows]
            part = NoisedBatch(batch.x0[rows], y, batch.t[rows], batch.noise[rows])
            with trainer.precision_plugin.forward_context():
                return module.sample_losses(part).loss

        scaler = getattr(trainer.precision_plugin, "scaler", None)
        trained = {name: p for name, p in module.backbone.named_parameters() if p.requires_grad}
        with torch.compiler.set_stance("force_eager"):  # groups differ in size: compiling each would take minutes
            result = gramian_by_subbatches(
                sample_loss, trained, group, num_groups, 1.0 if scaler is None else scaler.get_scale()
            )
        return Gramian(
            result.layers,
            trainer.strategy.reduce(result.values, reduce_op="mean"),
            trainer.strategy.reduce(result.counts, reduce_op="sum"),
            trainer.strategy.reduce(result.losses, reduce_op="mean"),
        )

    def _write(self, trainer: pl.Trainer, module: DenoiserModule, gramian: Gramian) -> None:
        writer = writer_of(trainer)
        if writer is None:
            return
        step = trainer.global_step + 1
        values = gramian.values.float().cpu().numpy()
        layers = len(gramian.layers)
        rows: dict[str, Any] = {
            "step": [step] * layers,
            "layer": list(gramian.layers),
            "halves": [self.halves] * layers,
            "group_count": [gramian.counts.tolist()] * layers,
            "group_loss": [gramian.losses.tolist()] * layers,
            "gramian": list(values.reshape(layers, -1)),
        }
        writer.log_rows(GRADIENT_GRAMIAN, rows)
        cosine = task_cosine(values.sum(0, dtype=np.float64), gramian.counts.cpu().numpy(), self.halves)
        pairs = cosine[np.triu_indices(len(cosine), 1)]
        pairs = pairs[np.isfinite(pairs)]
        if len(pairs):
            metrics = {"conflict/rate": float((pairs < 0).mean()), "conflict/mean_cosine": float(pairs.mean())}
            writer.log_metrics(metrics, step)
        measurements = trainer.max_steps // self.every_n_steps
        thinning = max(1, -(-measurements // self.max_heatmaps))
        if step // self.every_n_steps % thinning == 0:
            labels = interval_labels(module.intervals.bounds)
            writer.log_image(
                "conflict_cosine", heatmap_image(cosine, labels, title=f"Gradient cosine, step {step}"), step
            )


def task_cosine(gramian: np.ndarray, counts: np.ndarray, halves: int) -> np.ndarray:
    """Cosine between the tasks' mean gradients, (K, K), from the Gramian over groups (G, G).

    A task's gradient is the mean of its groups' gradients weighted by their counts. NaN where a task is empty or its
    gradient is zero.
    """
    weights = counts.reshape(-1, halves).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        weights /= weights.sum(1, keepdims=True)
        tasks = len(weights)
        blocks = gramian.reshape(tasks, halves, tasks, halves)
        product = np.einsum("ia,iajb,jb->ij", weights, blocks, weights)
        norm = np.sqrt(np.diagonal(product))
        cosine = product / np.outer(norm, norm)
    cosine[~np.isfinite(cosine)] = np.nan
    return cosine
