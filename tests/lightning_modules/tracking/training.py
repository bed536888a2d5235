"""A toy training for the tests of logger and callback; also run as a script, to be killed.

Usage: ``python -m tests.lightning_modules.tracking.training FOLDER URI STEPS [--die-at STEP] [--resume CHECKPOINT]``
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.tracking import records
from lightning_modules.tracking.callback import RunTracking, tracking_state, writer_of
from lightning_modules.tracking.logger import TrackingLogger


class Toy(LightningModule):
    """Four weights; calls `at_step[step]` once that many steps are completed."""

    def __init__(self, width: int = 3, at_step: dict | None = None) -> None:
        super().__init__()
        self.save_hyperparameters("width")
        self.layer = torch.nn.Linear(width, 1)
        self.at_step = at_step or {}

    def training_step(self, batch, batch_idx):
        action = self.at_step.get(self.trainer.global_step)
        if action is not None:
            action()
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Probe(Callback):
    """Logs a metric and an image at each step; holds rows back until a checkpoint, as real probes do."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        writer_of(trainer).log_metrics({"loss/train": step * 1.5}, step)
        writer_of(trainer).log_image("conflict_cosine", np.full((8, 8, 3), step, dtype=np.uint8), step)
        self.held.append(step)

    def flush(self, trainer):
        columns = dict.fromkeys(("window_start", "timestep", "count", "sum", "sum_sq"), np.array(self.held, dtype=int))
        columns |= {"step": self.held, "split": "train", "quantity": "mse"}
        writer_of(trainer).log_rows(records.TIMESTEP_LOSS, columns)
        self.held = []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.flush(trainer)

    def on_train_end(self, trainer, pl_module):
        self.flush(trainer)


def data() -> DataLoader:
    """Ten batches of two."""
    return DataLoader(TensorDataset(torch.ones(20, 3)), batch_size=2)


def trainer(logger, folder: Path, steps: int, callbacks: list, **options) -> Trainer:
    """A quiet CPU trainer."""
    return Trainer(
        max_steps=steps,
        logger=logger,
        callbacks=callbacks,
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def main() -> None:
    """Trains, perhaps from a checkpoint, perhaps to be killed without warning."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("uri")
    parser.add_argument("steps", type=int)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--resume")
    arguments = parser.parse_args()
    run_id = tracking_state(arguments.resume).run_id if arguments.resume else None
    logger = TrackingLogger(arguments.uri, run_dir=str(arguments.folder / "runs"), run_id=run_id)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    model = Toy(at_step={arguments.die_at: die} if arguments.die_at is not None else None)
    checkpoints = ModelCheckpoint(every_n_train_steps=4, save_top_k=-1, filename="{step}")
    callbacks = [RunTracking(every_n_steps=2), Probe(), checkpoints]
    trainer(logger, arguments.folder, arguments.steps, callbacks).fit(model, data(), ckpt_path=arguments.resume)
    print(logger.run_id)


if __name__ == "__main__":
    main()
