"""Which batches belong to which optimizer step, when a callback measures, and what the loss is scaled by."""

from __future__ import annotations

import pytorch_lightning as pl


def is_scheduled(trainer: pl.Trainer, batch_idx: int, every_n_steps: int) -> bool:
    """Whether the batch that starts now belongs to a step to measure: number n, 2n, 3n, …; never for n = 0.

    With gradient accumulation only the first batch of a step counts.
    """
    if every_n_steps == 0 or batch_idx % trainer.accumulate_grad_batches:
        return False
    return (trainer.global_step + 1) % every_n_steps == 0


def completes_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps at the end of this batch: always, unless gradients are accumulated over several."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def loss_scale(trainer: pl.Trainer) -> float:
    """What a gradient scaler multiplies the loss by at present; 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()
