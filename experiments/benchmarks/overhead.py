"""What measuring and tracking cost a training step.

``python -m experiments.benchmarks.overhead [--json]`` trains the demo's DTR model in four ways, in turn, several times
over, in one process, and compares the time per step:

- *plain*: no probe, no tracking;
- *default*: all three probes at their defaults, tracked to a fresh SQLite store;
- *bare, every step*: all probes at every step, with nothing recorded: the probes' arithmetic alone;
- *every step*: the same, recorded.

Ratios are medians over rounds, each round's ways against that round's plain steps, so that drift of the machine's
speed cancels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytorch_lightning as pl

from experiments.train import TRAINER_DEFAULTS, quieten
from lightning_modules.backbones.dit import DiTConfig
from lightning_modules.config import OptimizationConfig
from lightning_modules.data.digits import DigitsData
from lightning_modules.denoiser import DTRModule
from lightning_modules.diffusion import DiffusionConfig
from lightning_modules.probes.channel_activation import ChannelActivationProbe
from lightning_modules.probes.gradient_conflict import GradientConflictProbe
from lightning_modules.probes.timestep_loss import TimestepLossProbe
from lightning_modules.run_record import RunRecord
from lightning_modules.tracking.callback import RunTracking
from lightning_modules.tracking.logger import TrackingLogger

WARM_UP_STEPS = 20
RUN_LENGTH = 2000
"""Steps the trainer believes it will run, as in the demo: it decides how many heatmaps there are."""


class StepClock(pl.Callback):
    """Stops training after ``steps`` timed steps and keeps their mean duration in seconds."""

    def __init__(self, steps: int) -> None:
        self.last = WARM_UP_STEPS + steps
        self.steps = steps
        self.started = 0.0
        self.seconds_per_step = float("nan")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Starts and stops the clock."""
        if trainer.global_step == WARM_UP_STEPS:
            self.started = time.perf_counter()
        elif trainer.global_step == self.last:
            self.seconds_per_step = (time.perf_counter() - self.started) / self.steps
            trainer.should_stop = True


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train: the probes' schedule (None: no probes; 0: their defaults) and whether to record."""

    schedule: int | None
    tracked: bool
    steps: int


def probes(schedule: int | None) -> list[pl.Callback]:
    """The three probes, at their defaults (0) or every ``schedule`` steps."""
    if schedule is None:
        return []
    if not schedule:
        return [TimestepLossProbe(), GradientConflictProbe(), ChannelActivationProbe()]
    return [TimestepLossProbe(schedule), GradientConflictProbe(schedule), ChannelActivationProbe(schedule)]


def seconds_per_step(way: Way, folder: Path) -> float:
    """Trains the demo's DTR model in one way."""
    backbone = DiTConfig(
        input_size=8,
        patch_size=2,
        in_channels=1,
        hidden_size=64,
        depth=4,
        num_heads=4,
        num_classes=10,
        learn_sigma=False,
    )
    module = DTRModule(
        backbone,
        diffusion=DiffusionConfig(schedule="cosine", variance="fixed_small"),
        optimization=OptimizationConfig(learning_rate=1e-3, ema_decay=0.999),
    )
    data = DigitsData(batch_size=64)
    data.setup()
    clock = StepClock(way.steps)
    callbacks = probes(way.schedule)
    logger: TrackingLogger | bool = False
    if way.tracked:
        logger = TrackingLogger(
            f"sqlite:///{folder / 'mlflow.db'}", experiment="overhead", run_dir=str(folder / "runs")
        )
        callbacks += [RunRecord(data), RunTracking()]
    trainer = pl.Trainer(
        **{**TRAINER_DEFAULTS, "max_steps": RUN_LENGTH},
        logger=logger,
        callbacks=[*callbacks, clock],
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, data)
    return clock.seconds_per_step


def measure(rounds: int, steps: int, steps_every: int) -> dict[str, float]:
    """Runs all ways in turn, ``rounds`` times."""
    ways = {
        "plain": Way(None, False, steps),
        "default": Way(0, True, steps),
        "bare_every_step": Way(1, False, steps_every),
        "every_step": Way(1, True, steps_every),
    }
    ratios: dict[str, list[float]] = {name: [] for name in ways if name != "plain"}
    plain = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            seconds = {name: seconds_per_step(way, Path(folder)) for name, way in ways.items()}
            plain.append(seconds["plain"])
            for name, values in ratios.items():
                values.append(seconds[name] / seconds["plain"])
            shown = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
            print(f"round {number + 1} of {rounds}: {shown}", file=sys.stderr)
    median = {name: statistics.median(values) for name, values in ratios.items()}
    return {
        "ratio_default": median["default"],
        "ratio_every_step": median["every_step"],
        "arithmetic_every_step": median["bare_every_step"],
        "steps": rounds * (2 * steps + 2 * steps_every),
        "milliseconds_plain": 1e3 * statistics.median(plain),
        "ratio_default_min": min(ratios["default"]),
        "ratio_default_max": max(ratios["default"]),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.overhead", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        default=400,
        help="timed steps of plain and default, a multiple of 200 (default: %(default)s)",
    )
    parser.add_argument("--steps-every", type=int, default=50, help="timed steps of the others (default: %(default)s)")
    args = parser.parse_args()
    quieten()
    result = measure(args.rounds, args.steps, args.steps_every)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"A step takes {result['milliseconds_plain']:.1f} ms. With all probes at their defaults and tracking it takes "
        f"{result['ratio_default']:.3f} times as long ({result['ratio_default_min']:.3f} to "
        f"{result['ratio_default_max']:.3f} over {args.rounds} rounds); with all probes at every step "
        f"{result['ratio_every_step']:.2f} times, with nothing recorded {result['arithmetic_every_step']:.2f} times."
    )


if __name__ == "__main__":
    main()
