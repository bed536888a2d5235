"""``dtr-lab train``: one training from a YAML configuration, by LightningCLI."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from experiments.refusals import plain
from experiments.sweeping.files import read_mapping
from experiments.sweeping.settings import differences
from lightning_modules.backbones.build import backbone_config
from lightning_modules.checkpoint import StepCheckpoint, completed_settings, read_checkpoint
from lightning_modules.data.digits import DigitsData
from lightning_modules.data.image_folder import ImageFolderData
from lightning_modules.data.images import ImageData
from lightning_modules.denoiser import BaselineModule, DenoiserModule, DTRModule
from lightning_modules.errors import UserInputError
from lightning_modules.folders import writable_folder
from lightning_modules.probes.channel_activation import ChannelActivationProbe
from lightning_modules.probes.gradient_conflict import GradientConflictProbe
from lightning_modules.probes.task_weight import TaskWeightProbe
from lightning_modules.probes.timestep_loss import TimestepLossProbe
from lightning_modules.progress import StepProgress
from lightning_modules.run_record import RESUME_KEY, RunRecord, resume_settings
from lightning_modules.sample_grid import SampleGrid
from lightning_modules.tracking.callback import RunTracking, tracking_state_in
from lightning_modules.tracking.logger import TrackingLogger
from lightning_modules.tracking.store import redacted
from lightning_modules.training_clock import TrainingClock

__all__ = ["BaselineModule", "DTRModule", "DigitsData", "ImageFolderData", "main"]  # short class_path names in YAML

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 1000,
    "max_epochs": -1,
    "accelerator": "auto",
    "val_check_interval": 250,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 50,
    "use_distributed_sampler": False,  # our batch sampler divides the batch among processes itself
    "enable_model_summary": False,
}


class TrainCLI(LightningCLI):
    """Adds to LightningCLI: tracking, probes, samples and checkpoints as named groups, and one seed for everything."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Declares the groups. Probes and samples are turned off by ``every_n_steps: 0``."""
        parser.add_class_arguments(TrackingLogger, "tracking")
        parser.add_lightning_class_args(TimestepLossProbe, "timestep_loss")
        parser.add_lightning_class_args(GradientConflictProbe, "gradient_conflict")
        parser.add_lightning_class_args(ChannelActivationProbe, "channel_activation")
        parser.add_lightning_class_args(SampleGrid, "samples")
        parser.add_lightning_class_args(StepProgress, "progress")
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.add_argument("--resume", type=str | None, default=None, help="Checkpoint to go on from.")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Checks settings here, where the reason for a refusal is not lost among types tried."""
        for name, value in self.config.model.init_args.as_dict().items():
            if isinstance(value, list):
                raise UserInputError(f"model.init_args.{name} must hold settings, KEY: VALUE, but is the list {value}")
        settings = self.config.model.init_args.backbone
        backbone_config(settings.get("init_args", settings).as_dict())

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Gives the trainer our logger, and the callbacks that need the finished parts."""
        config = self.parser.dump(self.config, skip_link_targets=False)
        uri = self.config.tracking.tracking_uri
        if uri is not None:
            config = config.replace(uri, redacted(uri))  # it becomes an artifact; a password must not
        trainer_config = self._get(self.config_init, "trainer")
        tracking = RunTracking(every_n_steps=trainer_config["log_every_n_steps"], config=config)
        extra = [RunRecord(self.datamodule), tracking, TrainingClock(), TaskWeightProbe()]
        callbacks = trainer_config.get("callbacks") or []
        return super().instantiate_trainer(
            logger=self._get(self.config_init, "tracking"), callbacks=[*callbacks, *extra], **kwargs
        )


def check_fit(module: DenoiserModule, data: ImageData, trainer: Trainer) -> None:
    """Everything that can be known to be wrong before a run is created.

    Raises:
        UserInputError: Naming the culprit and the cure.
    """
    if trainer.max_steps < 1:
        raise UserInputError(
            f"trainer.max_steps must be at least 1, got {trainer.max_steps}: training has no other end"
        )
    if trainer.accumulate_grad_batches < 1:
        raise UserInputError(
            f"trainer.accumulate_grad_batches must be at least 1, got {trainer.accumulate_grad_batches}"
        )
    config = module.backbone.config
    if config.input_size != data.image_size or config.in_channels != data.channels:
        raise UserInputError(
            f"data set {data.name} has images of {data.channels} x {data.image_size} x {data.image_size}, but the "
            f"backbone takes {config.in_channels} x {config.input_size} x {config.input_size}: set "
            f"model.init_args.backbone.in_channels and input_size to match"
        )
    if config.num_classes not in (0, data.num_classes):
        raise UserInputError(
            f"data set {data.name} has {data.num_classes} classes, but backbone.num_classes is {config.num_classes}: "
            f"set it to {data.num_classes}, or to 0 for an unconditional model"
        )
    if data.batch_size % trainer.world_size:
        raise UserInputError(f"data.batch_size {data.batch_size} must be divisible by {trainer.world_size} processes")
    _check_sampler(module, trainer)
    _check_balancing(module, data, trainer)
    data.setup("fit")
    _check_validation(module, data)


def _conflict_probes(trainer: Trainer) -> list[GradientConflictProbe]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, GradientConflictProbe) and each.every_n_steps]


def _check_balancing(module: DenoiserModule, data: ImageData, trainer: Trainer) -> None:
    """Multi-task methods need samples of all tasks, and measure for the probes."""
    method = module.balancing.method
    for name in module.balancing.unused():
        rank_zero_warn(f"balancing.{name} is set, but balancing.method {method} makes no use of it", stacklevel=3)
    if method == "none":
        return
    share = module.sampler.interval_importance()
    widths = torch.tensor(module.intervals.widths, dtype=torch.float64) / module.intervals.num_timesteps
    batch = data.batch_size // trainer.world_size
    fewest = float((batch * widths / share).min())
    if fewest < 1:
        raise UserInputError(
            f"balancing.method {method} needs samples of every interval, but a batch of {batch} drawn by the sampler "
            f"{module.sampler_config.name!r} has only {fewest:.2f} of the rarest of {module.intervals.num_intervals} "
            "on average: raise data.batch_size, use fewer intervals, or another sampler"
        )
    others = [probe for probe in _conflict_probes(trainer) if probe.processes != module.balancing.processes]
    if trainer.world_size > 1 and module.balancing.uses_gradients and others:
        raise UserInputError(
            f"balancing.processes is {module.balancing.processes!r}, but gradient_conflict.processes is "
            f"{others[0].processes!r}: they share one measurement, so set both to the same"
        )


def _check_sampler(module: DenoiserModule, trainer: Trainer) -> None:
    """A sampler that goes by the gradients' noise needs the probe that measures it."""
    if module.sampler_config.name != "gradient_noise" or module.interval_config.only is not None:
        return
    if not any(probe.halves >= 2 for probe in _conflict_probes(trainer)):
        raise UserInputError(
            "sampler.name gradient_noise learns from the gradient_conflict probe: set gradient_conflict.every_n_steps "
            "above 0 and gradient_conflict.halves to 2 or more"
        )


def _check_validation(module: DenoiserModule, data: ImageData) -> None:
    """Stratified batches give every interval its share only if they are large enough for one sample each."""
    assert data.val_set is not None
    held_out, intervals = len(data.val_set), module.intervals.num_intervals  # type: ignore[arg-type]
    if min(held_out, data.val_batch_size) < intervals:
        raise UserInputError(
            f"{held_out} held-out images in batches of {data.val_batch_size} cannot cover {intervals} timestep "
            "intervals: hold out more images, raise data.val_batch_size, or use fewer intervals"
        )


def resume_run(path: str, cli: TrainCLI, logger: TrackingLogger) -> None:
    """Makes the logger go on with the run that the checkpoint belongs to.

    Raises:
        UserInputError: If the file is no checkpoint, or the configuration differs from its run's in what would make
            the rest of the run another experiment, or there is nothing left to train.
    """
    checkpoint = read_checkpoint(path)
    stored, asked = completed_settings(checkpoint["hyper_parameters"]), dict(cli.model.hparams)
    stored.update(checkpoint.get(RESUME_KEY, {}))
    asked.update(resume_settings(cli.trainer, cli.datamodule))
    state = tracking_state_in(checkpoint, path)
    other = [part for part in sorted(stored.keys() | asked.keys()) if stored.get(part) != asked.get(part)]
    if other:
        before, now = ({part: settings.get(part) for part in other} for settings in (stored, asked))
        raise UserInputError(
            f"cannot resume from {path} with other settings: {differences(before, now)}. Undo the change, or take the "
            f"config.yaml among the artifacts of run {state.run_id} in MLflow"
        )
    if state.step >= cli.trainer.max_steps:
        raise UserInputError(
            f"nothing to resume: {path} is at step {state.step}, and trainer.max_steps is {cli.trainer.max_steps}"
        )
    logger.resume(state.run_id)


def main(argv: Sequence[str]) -> int:
    """Trains; the exit status is 0 when training finished, 130 when it was interrupted."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    quieten()
    cli = configure(argv)
    logger = cli.trainer.logger
    assert isinstance(logger, TrackingLogger)
    check_fit(cli.model, cli.datamodule, cli.trainer)
    resume = cli.config.get("resume")
    if resume is not None:
        resume_run(resume, cli, logger)
    if logger.run_name is None:
        logger.run_name = f"{cli.model.method}-seed{cli.model.seed}"
    run_dir = writable_folder(logger.save_dir, "tracking.run_dir")
    torch.set_float32_matmul_precision("high")
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=resume)
    except SystemExit:  # Lightning turns Ctrl-C into an exit of its own, after it has closed the run as KILLED
        if logger.run_id is not None:
            last = run_dir / logger.run_id / "checkpoints" / "last.ckpt"
            hope = f"go on with --resume={last}" if last.exists() else "no checkpoint was written yet"
            print(f"Run {logger.run_id} interrupted at step {cli.trainer.global_step}; {hope}", file=sys.stderr)
        return 130
    except MisconfigurationException as error:
        raise UserInputError(str(error)) from error
    if logger.run_id is not None:  # only the first process has it
        print(f"Run {logger.run_id}, checkpoints in {run_dir / logger.run_id / 'checkpoints'}", file=sys.stderr)
    return 0


def configure(argv: Sequence[str]) -> TrainCLI:
    """Parses the command line and builds model, data and trainer.

    Raises:
        UserInputError: Whatever is wrong with the configuration, in one message.
    """
    for path in _config_files(argv):
        read_mapping(path)
    try:
        return TrainCLI(
            DenoiserModule,
            ImageData,
            args=list(argv),
            run=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={"prog": "dtr-lab train", "exit_on_error": False, "allow_abbrev": False},
        )
    except UserInputError:
        raise
    except (ArgumentError, ValueError, TypeError, AttributeError, ImportError, MisconfigurationException) as error:
        raise UserInputError(plain(error)) from error


def _config_files(argv: Sequence[str]) -> list[Path]:
    """The configuration files on a command line; the parser's own complaints about their form do not name them."""
    values = [after for option, after in itertools.pairwise(argv) if option == "--config"]
    values += [option.removeprefix("--config=") for option in argv if option.startswith("--config=")]
    return [path for path in map(Path, values) if path.is_file()]


def quieten() -> None:
    """Silences notices that a user can do nothing about; warnings about the training stay."""
    for pattern in ("args parameter is intended", "does not have many workers", "isinstance\\(treespec, LeafSpec"):
        warnings.filterwarnings("ignore", f".*{pattern}")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for name in ("lightning_fabric.utilities.seed", "mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
