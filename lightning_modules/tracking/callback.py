"""Ties a run to its training: begins it, notes it in checkpoints, and logs speed and learning rate."""

from __future__ import annotations

import dataclasses
import os
import pickle
import time
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, Checkpoint, ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn

from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from lightning_modules.tracking.logger import TrackingLogger
from lightning_modules.tracking.writer import RunWriter

CHECKPOINT_KEY = "dtr_tracking"


@dataclasses.dataclass(frozen=True)
class TrackingState:
    """What a checkpoint says about its run: its id, the attempt that wrote it, and the optimizer steps completed."""

    run_id: str
    attempt: int
    step: int


def tracking_logger(trainer: Trainer) -> TrackingLogger | None:
    """The trainer's `TrackingLogger`, if it has one."""
    return next((logger for logger in trainer.loggers if isinstance(logger, TrackingLogger)), None)


def writer_of(trainer: Trainer) -> RunWriter | None:
    """The writer probes log through; ask from ``on_train_start`` on, since asking begins the run.

    None off rank zero, without a `TrackingLogger`, and during Lightning's sanity check, whose numbers mean nothing.
    """
    logger = tracking_logger(trainer)
    if logger is None or not trainer.is_global_zero or trainer.sanity_checking:
        return None
    return logger.writer


def tracking_state(checkpoint_path: str | os.PathLike[str]) -> TrackingState:
    """Reads from a checkpoint which run to resume, without loading its weights.

    Raises:
        UserInputError: If there is no such file, it is no checkpoint, or it was written without `RunTracking`.
    """
    try:
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserInputError(f"there is no checkpoint {os.fspath(checkpoint_path)}") from None
    except (RuntimeError, pickle.UnpicklingError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserInputError(f"{os.fspath(checkpoint_path)} cannot be read as a checkpoint: {reason}") from error
    return tracking_state_in(checkpoint, checkpoint_path)


def tracking_state_in(checkpoint: Any, path: str | os.PathLike[str]) -> TrackingState:
    """`tracking_state` of a checkpoint that was read already; ``path`` is for the error.

    Raises:
        UserInputError: If it was written without `RunTracking`.
    """
    state = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    if state is None:
        raise UserInputError(
            f"{os.fspath(path)} names no run: it was saved without the RunTracking callback, or with "
            "weights only; train from it as a new run"
        )
    return TrackingState(**state)


class RunTracking(Callback):
    """Begins the run when training starts and keeps run and checkpoints in step.

    Before each checkpoint everything measured so far is committed to disk, so that what a resumed training will not
    measure again is never lost. Callbacks that hold back measurements must hand them over in their own
    ``on_save_checkpoint``; this one moves itself behind them (and before the checkpoint callbacks), wherever it
    stands in the list.

    Args:
        every_n_steps: How often speed and learning rate are logged, in optimizer steps.
        config: The resolved configuration as YAML, kept with the run as ``config.yaml``.

    Raises:
        ValueError: If `every_n_steps` is not positive.
    """

    def __init__(self, every_n_steps: int = 50, config: str | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be positive, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.config = config
        self._run_id: str | None = None
        self._clock: float | None = None
        self._clock_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Moves behind all callbacks that may still hand over measurements before a checkpoint."""
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        checkpoints = [callback for callback in others if isinstance(callback, Checkpoint)]
        probes = [callback for callback in others if not isinstance(callback, Checkpoint)]
        # A new list, because Lightning is iterating over the old one.
        trainer.callbacks = [*probes, self, *checkpoints]  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tells the logger where training continues from."""
        logger = tracking_logger(trainer)
        if logger is not None and trainer.state.fn == TrainerFn.FITTING:
            state = checkpoint.get(CHECKPOINT_KEY, {})
            logger.start_from_checkpoint(state.get("step", checkpoint["global_step"]), state.get("run_id"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the run, and points checkpoints to its folder."""
        logger = tracking_logger(trainer)
        if logger is None:
            return
        provisional = os.path.join(logger.save_dir, logger.provisional_version, "checkpoints")
        writer = writer_of(trainer)
        if writer is not None:
            parameters = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
            writer.set_tags({records.TAG_PARAMETERS: str(parameters)})
            if self.config is not None:
                writer.log_file(records.CONFIG_PATH, self.config)
        self._run_id = trainer.strategy.broadcast(logger.run_id)
        for callback in trainer.checkpoint_callbacks:
            # Lightning chose their folder before the run had an id.
            chosen = trainer.strategy.broadcast(provisional)
            if isinstance(callback, ModelCheckpoint) and callback.dirpath == chosen:
                callback.dirpath = os.path.join(logger.save_dir, str(self._run_id), "checkpoints")
        self._restart_clock(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs speed and learning rate at every n-th step, from host-side numbers only."""
        step = trainer.global_step
        if step == self._clock_step or step % self.every_n_steps:
            return  # the former: a step of gradient accumulation, which completes none
        writer = writer_of(trainer)
        if writer is None:
            return
        metrics = {}
        if self._clock is not None:
            metrics["speed/steps_per_second"] = (step - self._clock_step) / max(time.monotonic() - self._clock, 1e-9)
        rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None
        if isinstance(rate, float | int) or (isinstance(rate, torch.Tensor) and rate.device.type == "cpu"):
            metrics["optim/learning_rate"] = float(rate)
        if metrics:
            writer.log_metrics(metrics, step)
        self._restart_clock(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the time of validation out of the speed."""
        self._restart_clock(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Commits what was measured, and notes the run in the checkpoint."""
        logger = tracking_logger(trainer)
        if logger is None or self._run_id is None:
            return
        writer = logger.active_writer
        attempt = 1
        if writer is not None:
            writer.commit()
            attempt = writer.attempt
        checkpoint[CHECKPOINT_KEY] = {"run_id": self._run_id, "attempt": attempt, "step": trainer.global_step}

    def _restart_clock(self, trainer: Trainer) -> None:
        self._clock = time.monotonic()
        self._clock_step = trainer.global_step
