"""Probe: moments of the unweighted loss at every timestep, from every step, for free."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.denoiser import DenoiserModule
from lightning_modules.errors import UserInputError
from lightning_modules.moments import add_moments
from lightning_modules.schedule import completes_step
from lightning_modules.tracking.callback import writer_of
from lightning_modules.tracking.records import TIMESTEP_LOSS

QUANTITIES = ("mse", "vb")


class TimestepLossProbe(pl.Callback):
    """Writes table `TIMESTEP_LOSS`: count, sum and sum of squares per timestep.

    Training losses are summed on the device over a window of steps, so a step costs one small scatter; validation
    losses are taken from the module's fixed measurement.

    Args:
        every_n_steps: Length of the window that one set of rows covers; 0 turns the probe off.
    """

    def __init__(self, every_n_steps: int = 200) -> None:
        if every_n_steps < 0:
            raise UserInputError(f"timestep_loss every_n_steps must not be negative (0: off), got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._moments = torch.zeros(0)
        self._window_start = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: DenoiserModule) -> None:
        """Opens the first window."""
        self._open_window(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: DenoiserModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Adds the batch; closes the window when it is full."""
        if not self.every_n_steps:
            return
        add_moments(self._moments[0], outputs["t"], outputs["mse"])
        if outputs["vb"] is not None:
            add_moments(self._moments[1], outputs["t"], outputs["vb"])
        if completes_step(trainer, batch_idx) and trainer.global_step % self.every_n_steps == 0:
            self._close_window(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: DenoiserModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint ends the window, so that what it has seen is kept if training resumes here."""
        self._close_window(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: DenoiserModule) -> None:
        """Writes the last, possibly shorter window."""
        self._close_window(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: DenoiserModule, exception: BaseException) -> None:
        """Keeps what was measured; under several processes this process cannot wait for the others."""
        if trainer.world_size == 1:
            self._close_window(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: DenoiserModule) -> None:
        """Writes the fixed measurement; every process has all of it."""
        writer = writer_of(trainer)
        if writer is not None and self.every_n_steps and not trainer.sanity_checking:
            step = trainer.global_step
            writer.log_rows(TIMESTEP_LOSS, _rows(pl_module.validation_moments, "val", step, step))

    def _open_window(self, trainer: pl.Trainer, module: DenoiserModule) -> None:
        shape = (len(QUANTITIES), 3, module.diffusion.num_timesteps)
        self._moments = torch.zeros(shape, dtype=torch.float64, device=module.device)
        self._window_start = trainer.global_step

    def _close_window(self, trainer: pl.Trainer, module: DenoiserModule) -> None:
        if self.every_n_steps and trainer.global_step > self._window_start:
            moments = trainer.strategy.reduce(self._moments, reduce_op="sum")
            writer = writer_of(trainer)
            if writer is not None:
                writer.log_rows(TIMESTEP_LOSS, _rows(moments, "train", trainer.global_step, self._window_start))
            self._open_window(trainer, module)


def _rows(moments: Tensor, split: str, step: int, window_start: int) -> dict[str, Any]:
    """Columns of `TIMESTEP_LOSS` for the moments (2, 3, T), with a row per quantity and timestep that occurred."""
    table = moments.cpu().numpy()
    quantity, timestep = table[:, 0].nonzero()
    count, total, squares = (table[quantity, part, timestep] for part in range(3))
    rows = len(timestep)
    return {
        "step": [step] * rows,
        "window_start": [window_start] * rows,
        "split": [split] * rows,
        "quantity": [QUANTITIES[index] for index in quantity],
        "timestep": timestep,
        "count": count.astype("int64"),
        "sum": total,
        "sum_sq": squares,
    }
