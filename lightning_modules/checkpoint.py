"""Checkpoints: when one is written, what is in it, and the model it holds."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_modules.backbones.build import backbone_config
from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.config import IntervalConfig, OptimizationConfig, ValidationConfig
from lightning_modules.denoiser import BaselineModule, DenoiserModule, DTRModule
from lightning_modules.diffusion import DiffusionConfig
from lightning_modules.errors import UserInputError
from lightning_modules.loss_weights import LossWeightConfig
from lightning_modules.routing import MaskConfig
from lightning_modules.samplers import SamplerConfig


class StepCheckpoint(ModelCheckpoint):
    """Saves every n steps and at the end: ``step-<step>.ckpt`` and ``last.ckpt`` in ``<run_dir>/<run_id>/checkpoints``.

    Args:
        every_n_steps: Steps between two checkpoints.
        keep_all: Keep every checkpoint instead of the latest one.
    """

    def __init__(self, every_n_steps: int = 500, keep_all: bool = False) -> None:
        if every_n_steps < 1:
            raise UserInputError(f"checkpoint.every_n_steps must be at least 1, got {every_n_steps}")
        super().__init__(
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_steps,
            save_top_k=-1 if keep_all else 1,
            save_last=True,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the final weights, unless the schedule has just done so."""
        if self._last_global_step_saved != trainer.global_step and self.dirpath is not None:
            path = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            trainer.save_checkpoint(path, weights_only=False)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a training checkpoint, on the CPU. Unpickles tensors and plain values only.

    Raises:
        UserInputError: If there is no such file, or it is not a checkpoint of DTR Lab.
    """
    path = Path(path)
    if not path.is_file():
        raise UserInputError(f"no checkpoint at {path.absolute()}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch advises to load it unsafely, which nobody should
        raise UserInputError(
            f"{path} is not a checkpoint of DTR Lab: it is no file of torch.save, or holds more than tensors and plain "
            "values"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserInputError(f"cannot read checkpoint {path}, it may be damaged or cut short: {first_line}") from error
    if not isinstance(checkpoint, dict) or "hyper_parameters" not in checkpoint or "state_dict" not in checkpoint:
        raise UserInputError(f"{path} is not a checkpoint of DTR Lab: it lacks hyper_parameters or state_dict")
    return checkpoint


def completed_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a checkpoint as this version writes them: what older ones did not have yet, at its default.

    Raises:
        KeyError, TypeError: If they are not a denoiser's.
        UserInputError: If a value is out of range.
    """
    return {**stored, **{name: dataclasses.asdict(part) for name, part in _parts(stored).items()}}


def _parts(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a denoiser that settings in a checkpoint describe, by the names of its arguments."""
    kinds = {
        "diffusion": DiffusionConfig,
        "loss_weight": LossWeightConfig,
        "intervals": IntervalConfig,
        "sampler": SamplerConfig,
        "balancing": BalancingConfig,
        "optimization": OptimizationConfig,
        "validation": ValidationConfig,
        **({"routing": MaskConfig} if "routing" in stored else {}),
    }
    settings = dict(stored)
    sampling = settings["intervals"].get("sampling")  # where the sampler's name was, when there were two
    if sampling is not None:
        settings["intervals"] = {key: value for key, value in settings["intervals"].items() if key != "sampling"}
        settings["sampler"] = {"name": sampling}
    parts = {name: kind(**settings.get(name, {})) for name, kind in kinds.items()}
    return {"backbone": backbone_config(settings["backbone"]), **parts}


def load_denoiser(path: str | Path) -> DenoiserModule:
    """The module that a checkpoint holds, with its weights and their average, in evaluation mode, on the CPU.

    Raises:
        UserInputError: As `read_checkpoint`, and if the weights do not fit the settings stored beside them.
    """
    checkpoint = read_checkpoint(path)
    try:
        stored = checkpoint["hyper_parameters"]
        kind = DTRModule if "routing" in stored else BaselineModule
        module: DenoiserModule = kind(**_parts(stored), seed=stored["seed"])
        module.load_state_dict(checkpoint["state_dict"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserInputError(f"checkpoint {path} does not fit this version of DTR Lab: {error}") from error
    return module.eval()
