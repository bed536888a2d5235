"""Probe: the weights that a multi-task method gives the tasks, averaged over steps, for free."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_modules.denoiser import DenoiserModule
from lightning_modules.schedule import completes_step
from lightning_modules.tracking.callback import writer_of
from lightning_modules.tracking.records import TASK_WEIGHT, interval_labels


class TaskWeightProbe(pl.Callback):
    """Writes table `TASK_WEIGHT` and the scalars ``balancing/weight_<interval>``, every ``log_every_n_steps`` steps.

    A weight of 1 is that of plain training. Plain training itself writes nothing.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The sum since the last row, so that a resumed training writes the row that an unbroken one would."""
        return {"total": None if self._total is None else self._total.cpu(), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self._total, self._steps = state_dict["total"], state_dict["steps"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DenoiserModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the step's weights; writes their mean when it is time, and at the end."""
        if pl_module.balancing.method == "none" or not completes_step(trainer, batch_idx):
            return
        weights = pl_module.balancer.weights.double()
        self._total = weights.clone() if self._total is None else self._total.to(weights.device) + weights
        self._steps += 1
        step = trainer.global_step
        if step % trainer.log_every_n_steps and step != trainer.max_steps:  # type: ignore[attr-defined]
            return
        mean, count = (self._total / self._steps).tolist(), self._steps
        self._total, self._steps = None, 0
        writer = writer_of(trainer)
        if writer is None:
            return
        writer.log_rows(TASK_WEIGHT, {"step": [step], "window_start": [step - count], "weight": [mean]})
        labels = interval_labels(pl_module.intervals.bounds)
        writer.log_metrics(
            {f"balancing/weight_{label}": value for label, value in zip(labels, mean, strict=True)}, step
        )
