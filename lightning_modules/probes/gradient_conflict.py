"""Probe: inner products between the gradients of the tasks, per layer, from scheduled training steps themselves."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.balancing.balancer import Request
from lightning_modules.denoiser import DenoiserModule
from lightning_modules.errors import UserInputError
from lightning_modules.gradients import Gramian, GramianRecorder, split_tasks
from lightning_modules.gradients.gramian import trained_parameters
from lightning_modules.gradients.verification import WeightedGradient, deviations, weighted_gradient, without_layers
from lightning_modules.schedule import is_scheduled, loss_scale
from lightning_modules.tracking.callback import writer_of
from lightning_modules.tracking.heatmap import heatmap_image
from lightning_modules.tracking.records import GRADIENT_GRAMIAN, interval_labels


class GradientConflictProbe(pl.Callback):
    """Writes table `GRADIENT_GRAMIAN`, the scalars ``conflict/…`` and the heatmap ``conflict_cosine``.

    Scalars: ``conflict/rate`` and ``conflict/mean_cosine`` over the pairs of tasks of this probe, and
    ``conflict/mean_rate``, the mean of the rates of all probes so far.

    In a scheduled step it watches the forward and backward pass that training does anyway (`GramianRecorder`): no
    further pass, and the same gradient up to the order of floating-point sums. A compiled backbone runs eagerly in that
    step. With gradient accumulation the first batch of a step is measured. The first measurement is verified, at the
    price of one further pass; what it cannot vouch for, a warning names.

    Args:
        every_n_steps: Measure in every n-th step; 0 turns the probe off.
        halves: Disjoint groups per task. Two or more make products free of sampling noise, at hardly more cost.
        max_heatmaps: At most this many heatmaps a run, evenly spaced: a slider with more is no easier to read, and
            an image costs the store more than all other rows of a measurement.
        processes: ``"global"``: under several processes the exact Gramian of the whole batch, for an all-reduce of all
            groups' gradients (``num_intervals * halves`` times a step's usual traffic) in measured steps. ``"local"``:
            the mean of the processes' own Gramians, without that traffic; off the diagonal it has the same
            expectation, and the counts it records are those of one process.
        verify: Verify the first measurement of a training, see `gradients.verification`.
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        halves: int = 2,
        max_heatmaps: int = 100,
        processes: Literal["global", "local"] = "global",
        verify: bool = True,
    ) -> None:
        if every_n_steps < 0 or halves < 1 or max_heatmaps < 1:
            raise UserInputError(
                "gradient_conflict every_n_steps must not be negative (0: off), halves and max_heatmaps at least 1, "
                f"got {every_n_steps}, {halves} and {max_heatmaps}"
            )
        if processes not in ("global", "local"):
            raise UserInputError(f"gradient_conflict processes must be 'global' or 'local', got {processes!r}")
        self.every_n_steps = every_n_steps
        self.halves = halves
        self.max_heatmaps = max_heatmaps
        self.processes: Literal["global", "local"] = processes
        self._recorder: GramianRecorder | None = None
        self._gramian: Gramian | None = None
        self._shares = False  # whether the balancer measures in this step, and not a recorder of ours
        self._task_scale = torch.ones(0)
        self._group = torch.zeros(0)
        self._step = 0
        self._verifies = verify
        self._expected: WeightedGradient | None = None
        self._wrong: set[str] = set()
        self._warned = False
        self._rates = (0.0, 0)  # sum and number, for the mean: a single probe's rate is too noisy to sort runs by

    @property
    def state_key(self) -> str:
        """Tells two probes of one trainer apart in its checkpoints."""
        return self._generate_state_key(halves=self.halves, processes=self.processes)

    def state_dict(self) -> dict[str, Any]:
        """What the mean rate is made of, for the checkpoint."""
        return {"rates": list(self._rates)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the rates of the checkpoint."""
        total, number = state_dict.get("rates", (0.0, 0))
        self._rates = (float(total), int(number))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: DenoiserModule, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        """Starts recording in the steps that the schedule names."""
        self._stop(pl_module)
        if not is_scheduled(trainer, batch_idx, self.every_n_steps):
            return
        intervals = pl_module.intervals
        num_groups = intervals.num_intervals * self.halves
        task = intervals.task_of(pl_module.draw_timesteps(len(batch[0]), batch_idx))
        group = split_tasks(task, intervals.num_intervals, self.halves)
        if self._verifies:
            self._verifies = False
            with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
                drawn, own = pl_module.step_losses(batch, batch_idx)
                losses = pl_module.measured_losses(own, drawn.t)
            self._expected = weighted_gradient(
                losses,
                trained_parameters(pl_module.backbone),
                group,
                num_groups,
                loss_scale=loss_scale(trainer),
                processes=self.processes,
            )
        self._step = trainer.global_step + 1
        self._group = group
        self._task_scale = self._scale(pl_module)  # of this step: samplers learn from it
        if pl_module.balancing.method != "none":  # what is back-propagated is weighted: the balancer measures for us
            pl_module.gramian_request = Request(self.halves, self.processes)
            self._shares = True
            return
        self._recorder = GramianRecorder(
            pl_module.backbone,
            group,
            num_groups,
            scale=self._task_scale * (trainer.accumulate_grad_batches / loss_scale(trainer)),
            processes=self.processes,
        )
        self._recorder.__enter__()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: DenoiserModule) -> None:
        """Takes the Gramian, before anything changes the gradients."""
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            recorder.__exit__(None, None, None)
            self._gramian = self._verified(trainer, pl_module, recorder.result())
        elif self._shares and pl_module.balancer.gramian is not None:
            gramian, scale = pl_module.balancer.gramian, self._task_scale
            scaled = dataclasses.replace(gramian, values=gramian.values * scale[:, None] * scale)
            self._gramian = self._verified(trainer, pl_module, scaled)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DenoiserModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes what was measured in this batch."""
        self._stop(pl_module)
        if self._gramian is not None:
            gramian, self._gramian = self._gramian, None
            self._warn_if_incomplete(gramian)
            reduce = trainer.strategy.reduce
            total = torch.zeros_like(gramian.values[0, 0]).index_add_(
                0, self._group, outputs["sample_loss"].to(gramian.values)
            )
            own = torch.bincount(self._group, minlength=len(total))
            losses = reduce(total, reduce_op="sum") / reduce(own, reduce_op="sum")
            if self.processes == "local":
                counts = reduce(gramian.counts.double(), reduce_op="mean").round().long()
                values = reduce(gramian.values, reduce_op="mean")
                gramian = Gramian(gramian.layers, values, counts, gramian.coverage, gramian.uncovered)
            if pl_module.interval_config.only is None:
                pl_module.sampler.observe_gradients(gramian.total(), gramian.counts, self.halves)
            self._write(trainer, pl_module, gramian, losses)

    def on_exception(self, trainer: pl.Trainer, pl_module: DenoiserModule, exception: BaseException) -> None:
        """Stops recording."""
        self._stop(pl_module)

    def _stop(self, module: DenoiserModule) -> None:
        if self._shares:
            module.gramian_request, self._shares = None, False
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self._recorder = None

    def _verified(self, trainer: pl.Trainer, module: DenoiserModule, gramian: Gramian) -> Gramian:
        if self._expected is not None:
            expected, self._expected = self._expected, None
            if not gramian.values.isfinite().all():  # overflow under fp16 says nothing about the split
                self._verifies = True
                return gramian
            tolerance = 0.1 if "16" in str(trainer.precision) else 1e-3
            self._wrong = {layer for layer, error in deviations(gramian, expected).items() if error > tolerance}
        return without_layers(gramian, self._wrong, trained_parameters(module.backbone)) if self._wrong else gramian

    def _scale(self, module: DenoiserModule) -> Tensor:
        """Factors (G,): 1 over the tasks' importance that training multiplies the losses by."""
        scale = torch.ones(module.intervals.num_intervals, dtype=torch.float64)
        if module.weighs_samples:
            scale /= module.sampler.interval_importance()
        return scale.repeat_interleave(self.halves).to(module.device)

    def _warn_if_incomplete(self, gramian: Gramian) -> None:
        if gramian.coverage < 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"gradient_conflict covers {gramian.coverage:.1%} of the parameters; it misses gradients of "
                f"{', '.join(gramian.uncovered)}",
                stacklevel=2,
            )

    def _write(self, trainer: pl.Trainer, module: DenoiserModule, gramian: Gramian, losses: Tensor) -> None:
        writer, step = writer_of(trainer), self._step
        if writer is None:
            return
        values = gramian.values.float().cpu().numpy()
        if not np.isfinite(values).all():  # overflow under fp16: the scaler skips this step, and so do we
            return
        layers = len(gramian.layers)
        rows: dict[str, Any] = {
            "step": [step] * layers,
            "layer": list(gramian.layers),
            "halves": [self.halves] * layers,
            "group_count": [gramian.counts.tolist()] * layers,
            "group_loss": [losses.tolist()] * layers,
            "gramian": list(values.reshape(layers, -1)),
            "coverage": [gramian.coverage] * layers,
        }
        writer.log_rows(GRADIENT_GRAMIAN, rows)
        cosine = task_cosine(values.sum(0, dtype=np.float64), gramian.counts.cpu().numpy(), self.halves)
        pairs = cosine[np.triu_indices(len(cosine), 1)]
        pairs = pairs[np.isfinite(pairs)]
        if len(pairs):
            rate = float((pairs < 0).mean())
            self._rates = (self._rates[0] + rate, self._rates[1] + 1)
            metrics = {
                "conflict/rate": rate,
                "conflict/mean_rate": self._rates[0] / self._rates[1],
                "conflict/mean_cosine": float(pairs.mean()),
            }
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
