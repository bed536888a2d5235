"""Progress of a training that counts steps, with the time left."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm


class StepProgress(ProgressBar):
    """A bar over all steps (Lightning's own has no end when the data loader is endless).

    Args:
        style: ``"bar"`` draws a bar on standard error; ``"lines"`` prints one JSON object
            ``{"step", "max_steps", "loss"}`` a line on standard output, for a parent process to draw; ``"off"`` is
            silent.
        every_seconds: Least time between two updates.
    """

    def __init__(self, style: Literal["bar", "lines", "off"] = "bar", every_seconds: float = 0.5) -> None:
        super().__init__()
        self.style = style
        self.every_seconds = every_seconds
        self._bar: Any = None
        self._shown = 0.0

    def disable(self) -> None:
        """Lightning silences all processes but the first."""
        self.style = "off"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar at the step a resumed run starts from."""
        if self.style == "bar":
            self._bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, unit="step", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Shows the step, at most every so often."""
        now = time.monotonic()
        if self.style != "off" and (
            now - self._shown >= self.every_seconds or trainer.global_step == trainer.max_steps
        ):
            self._shown = now
            self._show(trainer)

    def _show(self, trainer: pl.Trainer) -> None:
        losses = {
            key: float(value) for key, value in trainer.callback_metrics.items() if key in ("loss/train", "loss/val")
        }
        if self._bar is not None:
            self._bar.set_postfix({key: f"{value:.4f}" for key, value in losses.items()}, refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)
        elif self.style == "lines":
            state = {"step": trainer.global_step, "max_steps": trainer.max_steps, "loss": losses.get("loss/train")}
            sys.stdout.write(json.dumps(state) + "\n")
            sys.stdout.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that a traceback starts on a line of its own."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
