"""``dtr-lab demo``: the main job, end to end, on real digits.

Trains a plain DiT, random routing and DTR, two seeds each, side by side; compares them; says where to look.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.trainings import Training

EXPERIMENT = "digits-demo"
METHODS = ("baseline", "random", "dtr")
CONFIGS = Path(__file__).parent / "digits"
_SHORT = (
    *("--batch-size=64", "--repeats=16", "--fine-tuning-repeats=2", "--evaluation-samples=256", "--images=384"),
    *("--updates", "10", "40"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of each method (default: 0 1)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps per run (default: %(default)s)")
    parser.add_argument(
        "--no-affinity", action="store_true", help="do not measure what the intervals do to each other (saves a third)"
    )
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side (default: %(default)s)")
    parser.add_argument("--tracking-uri", help="MLflow store (default: $MLFLOW_TRACKING_URI or sqlite:///mlflow.db)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="checkpoints (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Trains, compares, reports. Returns 1 if a training failed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for chatty in ("mlflow.store.db.utils", "alembic"):  # they report the set-up of a new store line by line
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from experiments.compare import compare, print_summary
    from experiments.comparisons import create_comparison
    from experiments.trainings import Training, report_failures, run_trainings
    from experiments.ui import ui_command
    from lightning_modules.errors import UserInputError
    from lightning_modules.folders import writable_folder
    from lightning_modules.tracking.store import check_store, mlflow_client, resolve_tracking_uri

    if args.steps < 1 or args.workers < 1 or len(set(args.seeds)) < len(args.seeds):
        raise UserInputError("--steps and --workers must be at least 1, and --seeds must differ from one another")
    uri = resolve_tracking_uri(args.tracking_uri)
    check_store(uri)
    comparison = time.strftime("demo-%Y%m%d-%H%M%S")
    print(f"DTR Lab demo: {len(METHODS)} methods x {len(args.seeds)} seeds x {args.steps} steps on 1,500 real digits.")
    out = writable_folder(args.run_dir / comparison, "--run-dir")
    parent = create_comparison(uri, experiment=EXPERIMENT, comparison=comparison)
    status = "FAILED"
    try:
        jobs = [
            Training(
                name=f"{method} seed {seed}",
                arguments=_arguments(method, seed, args, uri, comparison, parent),
                log=out / "logs" / f"{method}-seed{seed}.log",
            )
            for seed in args.seeds
            for method in METHODS
        ]
        if report_failures(run_trainings(jobs, workers=args.workers)):
            return 1
        if not args.no_affinity:
            print("\nMeasuring what the intervals do to each other …")
            if report_failures(run_trainings(_measurements(uri, comparison, out, args), workers=args.workers)):
                return 1
        print("\nComparing …")
        summary = compare(uri, experiment=EXPERIMENT, comparison=comparison, out=out)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        mlflow_client(uri).set_terminated(parent, status)
    print_summary(summary)
    print(f"\nOpen these runs in MLflow:\n  {ui_command(uri, EXPERIMENT, comparison)}")
    return 0


def _measurements(uri: str, comparison: str, out: Path, args: argparse.Namespace) -> list[Training]:
    """A `dtr-lab affinity` for the last checkpoint of every run, small enough for a demo."""
    from analysis.reading.store import logged_runs
    from experiments.trainings import Training
    from lightning_modules.tracking import records
    from lightning_modules.tracking.store import mlflow_client

    client = mlflow_client(uri)
    found = client.get_experiment_by_name(EXPERIMENT)
    assert found is not None  # the trainings have just logged to it
    runs = logged_runs(client, found.experiment_id, kind=records.KIND_TRAINING, comparison=comparison)
    options = ["--progress=lines", f"--tracking-uri={uri}", f"--out={args.run_dir / 'affinity'}", *_SHORT]
    return [
        Training(
            name=str(run.info.run_name).replace("-seed", " seed "),
            arguments=[str(args.run_dir / run.info.run_id / "checkpoints" / "last.ckpt"), *options],
            log=out / "logs" / f"affinity-{run.info.run_name}.log",
            command="affinity",
        )
        for run in runs
    ]


def _arguments(method: str, seed: int, args: argparse.Namespace, uri: str, comparison: str, parent: str) -> list[str]:
    """Command line of one training, after ``dtr-lab train``."""
    settings = {
        "config": CONFIGS / f"{method}.yaml",
        "seed_everything": seed,
        "trainer.max_steps": args.steps,
        "trainer.val_check_interval": min(100, args.steps),
        "progress.style": "lines",
        "tracking.tracking_uri": uri,
        "tracking.experiment": EXPERIMENT,
        "tracking.run_name": f"{method}-seed{seed}",
        "tracking.comparison": comparison,
        "tracking.parent_run_id": parent,
        "tracking.run_dir": args.run_dir,
    }
    if method == "random":
        settings["model.init_args.routing.seed"] = seed  # else all seeds would share one draw of the masks
    return [f"--{key}={value}" for key, value in settings.items()]
