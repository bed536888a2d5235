"""The measures of `dtr-lab affinity`, each from a checkpoint to rows of a telemetry table."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.measuring.draws import Draws
from experiments.probing.subject import Subject
from lightning_modules.optimization import build_optimizer
from lightning_modules.representation import RepresentationMeter
from lightning_modules.task_transfer import Transfer, TransferMeter
from lightning_modules.timesteps import TimestepIntervals
from lightning_modules.tracking.records import FINE_TUNING, LOOK_AHEAD, REPRESENTATION, TASK_TRANSFER

Rows = Mapping[str, Any]
MEASURES = (LOOK_AHEAD, FINE_TUNING, REPRESENTATION)
TABLE_OF = {LOOK_AHEAD: TASK_TRANSFER, FINE_TUNING: TASK_TRANSFER, REPRESENTATION: REPRESENTATION}


def work_of(measure: str, args: argparse.Namespace, tasks: int) -> int:
    """How many pieces `measure_rows` yields."""
    if measure == LOOK_AHEAD:
        return args.repeats
    if measure == FINE_TUNING:
        return args.fine_tuning_repeats * tasks
    return -(-args.images // args.batch_size)


def measure_rows(measure: str, args: argparse.Namespace, draws: Draws, step: int) -> Iterator[Rows]:
    """Columns of the measure's table, piece by piece.

    Args:
        measure: One of `MEASURES`.
        args: The options of the command.
        draws: The samples.
        step: Steps that the checkpoint was trained for.
    """
    if measure == LOOK_AHEAD:
        return _look_ahead(args, draws, step)
    if measure == FINE_TUNING:
        return _fine_tuning(args, draws, step)
    return _representation(args, draws, step)


def _look_ahead(args: argparse.Namespace, draws: Draws, step: int) -> Iterator[Rows]:
    meter = _meter(args.optimizer, args.learning_rate, draws)
    settings = _Settings(step, LOOK_AHEAD, args.optimizer, learning_rate_of(args, draws.subject))
    for repeat in range(args.repeats):
        found = meter.look_ahead(draws.stratified(repeat + 1), draws.stratified(repeat + 1, evaluation=True))
        yield settings.columns(found, repeat)


def _fine_tuning(args: argparse.Namespace, draws: Draws, step: int) -> Iterator[Rows]:
    meter = _meter("adamw", args.learning_rate, draws)
    settings = _Settings(step, FINE_TUNING, "adamw", learning_rate_of(args, draws.subject))
    batches = -(-args.evaluation_samples // args.batch_size)
    most = max(args.updates)
    for repeat in range(args.fine_tuning_repeats):
        evaluation = [draws.stratified(repeat * batches + number + 1, evaluation=True) for number in range(batches)]
        for task in range(draws.intervals.num_intervals):

            def draw(number: int, task: int = task, repeat: int = repeat) -> Any:
                return draws.within(task, repeat * most + number)

            found = list(meter.fine_tune(task, draw, evaluation, sorted(set(args.updates))))
            yield settings.columns(found, repeat)


def _representation(args: argparse.Namespace, draws: Draws, step: int) -> Iterator[Rows]:
    timesteps = probed_timesteps(draws.intervals, args.timesteps)
    subject = draws.subject
    meter = RepresentationMeter(subject.module, subject.backbone, timesteps, features=args.features, noise=args.noise)
    for batch in range(work_of(REPRESENTATION, args, draws.intervals.num_intervals)):
        hsic = meter.measure(*draws.clean(batch + 1))
        yield {
            "step": step,
            "block": list(hsic),
            "batch": batch,
            "count": args.batch_size,
            "timesteps": [timesteps] * len(hsic),
            "hsic": [values.flatten().numpy() for values in hsic.values()],
        }


def probed_timesteps(intervals: TimestepIntervals, most: int) -> list[int]:
    """About so many timesteps, the same number in each interval (or all of a narrower one), evenly spread."""
    each = max(1, most // intervals.num_intervals)
    found: list[int] = []
    for low, width in zip(intervals.bounds, intervals.widths, strict=False):
        places = (np.arange(min(each, width)) + 0.5) * width / min(each, width)
        found += (low + places.astype(int)).tolist()
    return found


def learning_rate_of(args: argparse.Namespace, subject: Subject) -> float:
    """The learning rate of the updates: the one asked for, else the checkpoint's."""
    return args.learning_rate if args.learning_rate is not None else subject.module.optimization.learning_rate


def _meter(optimizer: str, learning_rate: float | None, draws: Draws) -> TransferMeter:
    subject = draws.subject
    settings = subject.module.optimization

    def make(backbone: nn.Module) -> torch.optim.Optimizer:
        if optimizer == "sgd":
            trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
            return torch.optim.SGD(trained, lr=learning_rate or settings.learning_rate)
        made = build_optimizer(backbone, settings)
        made = made["optimizer"] if isinstance(made, dict) else made
        if subject.optimizer_state is not None:
            made.load_state_dict(copy.deepcopy(subject.optimizer_state))
        for group in made.param_groups:
            if learning_rate is not None:
                group["lr"] = learning_rate
        return made

    return TransferMeter(subject.module, subject.backbone, make, draws.intervals)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What all rows of a measure share."""

    step: int
    measure: str
    optimizer: str
    learning_rate: float

    def columns(self, found: Sequence[Transfer], repeat: int) -> Rows:
        """Columns of `TASK_TRANSFER`."""
        lists = ("count", "before", "change", "change_sq", "predicted")
        return {
            "step": self.step,
            "measure": self.measure,
            "optimizer": self.optimizer,
            "learning_rate": [self.learning_rate] * len(found),
            "repeat": repeat,
            "updates": [each.updates for each in found],
            "source": [each.source for each in found],
            **{name: [getattr(each, name).numpy() for each in found] for name in lists},
        }
