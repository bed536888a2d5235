"""Callback: how long training took, so that methods can be compared at equal time and not only at equal steps."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_modules.schedule import completes_step
from lightning_modules.tracking.callback import writer_of
from lightning_modules.tracking.records import TRAINING_TIME


class TrainingClock(pl.Callback):
    """Writes table `TRAINING_TIME`: seconds spent in training steps, added up over all attempts of a run.

    A step counts from the moment its batch is there to the end of its update, with what a probe adds to it, but
    without what is written, sampled, validated or saved between steps: those are choices of measurement and not of
    method. It puts itself before all other callbacks, since what they do at a step's end would count otherwise.

    On a GPU a step's kernels may still run when the next begins; the device is waited for whenever a row is written,
    so that the sum is right there.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None
        self._written_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Moves to the front."""
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        # A new list, because Lightning is iterating over the old one.
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts to count."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the step; writes where the training loss is logged, or a validation follows."""
        if self._started is None:
            return
        writes = completes_step(trainer, batch_idx) and self._is_due(trainer)
        if writes and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.seconds += time.perf_counter() - self._started
        self._started = None
        if writes:
            self._write(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leaves no gap where a run may be resumed."""
        self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the last step."""
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far, for the checkpoint."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the seconds of the checkpoint."""
        self.seconds = state_dict["seconds"]

    def _is_due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        every = (trainer.log_every_n_steps, trainer.val_check_batch)  # type: ignore[attr-defined]
        return step == trainer.max_steps or any(isinstance(n, int) and step % n == 0 for n in every)

    def _write(self, trainer: pl.Trainer) -> None:
        writer, step = writer_of(trainer), trainer.global_step
        if writer is not None and step > self._written_step:
            writer.log_rows(TRAINING_TIME, {"step": [step], "seconds": [self.seconds]})
            self._written_step = step
