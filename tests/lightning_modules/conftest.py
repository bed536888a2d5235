"""A trainer whose probes write to memory."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl

from lightning_modules.data.digits import DigitsData
from lightning_modules.probes import channel_activation, gradient_conflict, timestep_loss


class MemoryWriter:
    """Keeps what it is given, as `RunWriter` would be given it."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, dict]] = []
        self.metrics: list[tuple[int, dict]] = []
        self.images: list[tuple[int, str, np.ndarray]] = []

    def log_rows(self, table, columns):
        self.rows.append((table, columns))

    def log_metrics(self, metrics, step):
        self.metrics.append((step, metrics))

    def log_image(self, key, image, step):
        self.images.append((step, key, image))


@pytest.fixture
def writer(monkeypatch) -> MemoryWriter:
    memory = MemoryWriter()
    for module in (channel_activation, gradient_conflict, timestep_loss):
        monkeypatch.setattr(module, "writer_of", lambda trainer: memory)
    return memory


@pytest.fixture
def fit():
    """Trains a denoiser on digits with the given callbacks."""

    def run(module, *callbacks, steps=4, batch_size=16, ckpt_path=None, **settings):
        data = DigitsData(batch_size=batch_size)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **{"limit_val_batches": 0, "val_check_interval": steps, "check_val_every_n_epoch": None, **settings},
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return trainer

    return run
