"""Probe: how strongly each task uses each channel of each residual block, on a schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.denoiser import DenoiserModule
from lightning_modules.errors import UserInputError
from lightning_modules.schedule import completes_step, is_scheduled
from lightning_modules.tracking.callback import writer_of
from lightning_modules.tracking.records import CHANNEL_ACTIVATION, TABLES

SITES = ("input", "update")
DEAD = 1e-4
"""A channel counts as dead for a task if its mean square is below this share of the mean over all channels."""


class ChannelActivationProbe(pl.Callback):
    """Writes table `CHANNEL_ACTIVATION` and the scalars ``activation/…``.

    It listens during a scheduled training step's own forward pass and is not there at other steps. Measured are what a
    block's residual branches read (``input``: m * z, zero on masked channels) and what they add (``update``). In a
    U-Net the two may differ in their number of channels and of pixels.

    Args:
        every_n_steps: Measure in every n-th step; 0 turns the probe off.
        threshold: An entry is active if its magnitude exceeds this share of the root mean square over the block's
            whole input (or update).
    """

    def __init__(self, every_n_steps: int = 200, threshold: float = 0.1) -> None:
        if every_n_steps < 0:
            raise UserInputError(f"channel_activation every_n_steps must not be negative (0: off), got {every_n_steps}")
        if not threshold > 0:
            raise UserInputError(f"channel_activation threshold must be positive, got {threshold}")
        self.every_n_steps = every_n_steps
        self.threshold = threshold
        self._handles: list[Any] = []
        self._stance: Any = None
        self._samples: dict[tuple[str, str], tuple[Tensor, int]] = {}

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: DenoiserModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Starts to listen if the schedule names this step."""
        if not is_scheduled(trainer, batch_idx, self.every_n_steps):
            return
        # A compiled graph does not run hooks that were added after it was traced.
        self._stance = torch.compiler.set_stance("force_eager")
        self._stance.__enter__()
        self._handles = pl_module.backbone.observe_branches(self._observe)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: DenoiserModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stops listening and writes."""
        if not self._handles:
            return
        self._stop()
        moments = {
            key: trainer.strategy.reduce(self._by_task(pl_module, outputs["t"], *kept), reduce_op="sum")
            for key, kept in self._samples.items()
        }
        self._samples = {}
        writer = writer_of(trainer)
        if writer is not None:
            step = trainer.global_step if completes_step(trainer, batch_idx) else trainer.global_step + 1
            arrays = {key: value.cpu().numpy() for key, value in moments.items()}
            writer.log_rows(CHANNEL_ACTIVATION, _rows(arrays, step))
            writer.log_metrics(_summary(arrays), step)

    def on_exception(self, trainer: pl.Trainer, pl_module: DenoiserModule, exception: BaseException) -> None:
        """Leaves no hook behind."""
        self._stop()
        self._samples = {}

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    @torch.no_grad()
    def _observe(self, block: str, site: str, values: Tensor) -> None:
        """Keeps the means over the tokens of ``values`` (B, N, C), one row per sample: (B, 3, C), and N."""
        square = values.square()
        active = square > self.threshold**2 * square.mean()
        means = torch.stack([values.mean(1), square.mean(1), active.float().mean(1)], 1)
        self._samples[block, site] = (means, values.shape[1])

    def _by_task(self, module: DenoiserModule, t: Tensor, means: Tensor, tokens: int) -> Tensor:
        """Sums over samples and tokens per task, (K, 4, C): count, sum, sum of squares, number active."""
        per_sample = torch.cat([torch.ones_like(means[:, :1]), means], dim=1).double() * tokens
        total = torch.zeros(
            (module.intervals.num_intervals, *per_sample.shape[1:]), dtype=torch.float64, device=t.device
        )
        return total.index_add_(0, module.intervals.task_of(t), per_sample)


def _rows(moments: dict[tuple[str, str], np.ndarray], step: int) -> dict[str, list[Any]]:
    """Columns of `CHANNEL_ACTIVATION` from the sums (K, 4, C) of each block and site; empty tasks have no row."""
    columns: dict[str, list[Any]] = {field.name: [] for field in TABLES[CHANNEL_ACTIVATION]}
    for (block, site), sums in moments.items():
        for task, (count, total, squares, active) in enumerate(sums):
            if count[0] == 0:
                continue
            row = (step, block, site, task, int(count[0]), total / count, squares / count, active / count)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value.astype(np.float32) if isinstance(value, np.ndarray) else value)
    return columns


def _summary(moments: dict[tuple[str, str], np.ndarray]) -> dict[str, float]:
    """Dead share and effective number of channels of the blocks' inputs, averaged over blocks and tasks.

    The effective number is the participation ratio (sum of mean squares)^2 / (sum of their squares): C if all channels
    carry the same energy, 1 if one carries all.
    """
    dead, effective = [], []
    for (_, site), sums in moments.items():
        if site != "input":
            continue
        seen = sums[:, 0, 0] > 0
        energy = sums[seen, 2] / sums[seen, 0]
        dead.append((energy < DEAD * energy.mean(1, keepdims=True)).mean())
        effective.append((energy.sum(1) ** 2 / np.square(energy).sum(1)).mean())
    return {
        "activation/dead_fraction": float(np.mean(dead)),
        "activation/effective_channels": float(np.mean(effective)),
    }
