"""``dtr-lab specialists``: one model for each timestep interval, to see whether sharing a network pays (ANT, O2)."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_modules.errors import UserInputError

_QUIET = ("gradient_conflict", "channel_activation", "samples")
_DEFAULT_BATCH = 64
_DEFAULT_INTERVALS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("--config", type=Path, required=True, help="of the shared model, as for `dtr-lab train`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="those of the shared runs (default: 0)")
    parser.add_argument(
        "--budget",
        choices=["share", "full"],
        default="share",
        help="of a specialist. share: the steps of the shared model, in each as many samples of its interval as the "
        "shared model gets, so that nothing but the other tasks is missing. full: whole batches of its interval "
        "(default: %(default)s)",
    )
    parser.add_argument("--comparison", help="id of the shared runs' comparison, so that both are found together")
    parser.add_argument("--experiment", help="MLflow experiment (default: the configuration's)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="further settings for every training, such as trainer.max_steps=500",
    )
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side (default: %(default)s)")
    parser.add_argument("--tracking-uri", help="MLflow store (default: $MLFLOW_TRACKING_URI or sqlite:///mlflow.db)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="checkpoints (default: %(default)s)")


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What the shared model's configuration says about tasks and batches."""

    num_intervals: int
    batch_size: int
    experiment: str


def run(args: argparse.Namespace) -> int:
    """Trains all of them. Returns 1 if a training failed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from experiments.comparisons import find_comparison
    from experiments.trainings import Training, report_failures, run_trainings
    from lightning_modules.folders import writable_folder
    from lightning_modules.tracking.store import check_store, resolve_tracking_uri

    if args.workers < 1 or len(set(args.seeds)) < len(args.seeds):
        raise UserInputError("--workers must be at least 1, and --seeds must differ from one another")
    wrong = [text for text in args.settings if "=" not in text.strip("=")]
    if wrong:
        raise UserInputError(f"--set {' '.join(wrong)}: settings are KEY=VALUE, such as trainer.max_steps=500")
    shared = _read_config(args.config, args.settings)
    uri = resolve_tracking_uri(args.tracking_uri)
    check_store(uri)
    experiment = args.experiment or shared.experiment
    parent = find_comparison(uri, experiment=experiment, comparison=args.comparison) if args.comparison else None
    logs = writable_folder(args.run_dir / "specialists", "--run-dir")
    print(
        f"{shared.num_intervals} specialists x {len(args.seeds)} seeds, in batches of {_batch_size(args, shared)} "
        f"(the shared model: {shared.batch_size})."
    )
    jobs = [
        Training(
            name=f"task {task} seed {seed}",
            arguments=_arguments(task, seed, args, shared, {"tracking_uri": uri, "parent_run_id": parent}),
            log=logs / f"task{task}-seed{seed}.log",
        )
        for seed in args.seeds
        for task in range(shared.num_intervals)
    ]
    if report_failures(run_trainings(jobs, workers=args.workers)):
        return 1
    print(f"Read them with load_runs(experiment={experiment!r}, comparison={args.comparison!r}, kind='specialist').")
    return 0


def _read_config(path: Path, settings: list[str]) -> _Shared:
    """The numbers that the command itself needs; `dtr-lab train` checks everything else.

    Raises:
        UserInputError: If the file cannot be read, or trains one task already.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserInputError(f"--config {path}: {error}") from error
    if not isinstance(config, dict):
        raise UserInputError(f"--config {path} is no configuration of `dtr-lab train`")
    for text in settings:
        key, _, value = text.partition("=")
        _put(config, key.split("."), yaml.safe_load(value))
    intervals = _get(config, "model", "init_args", "intervals") or {}
    if intervals.get("only") is not None:
        raise UserInputError(f"--config {path} trains task {intervals['only']} alone: name the shared model's")
    bounds = intervals.get("bounds")
    return _Shared(
        num_intervals=len(bounds) - 1 if bounds else intervals.get("num_intervals", _DEFAULT_INTERVALS),
        batch_size=_get(config, "data", "init_args", "batch_size") or _DEFAULT_BATCH,
        experiment=_get(config, "tracking", "experiment") or "dtr-lab",
    )


def _get(config: Mapping[str, Any], *keys: str) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _put(config: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        config = config.setdefault(key, {})
    config[keys[-1]] = value


def _batch_size(args: argparse.Namespace, shared: _Shared) -> int:
    return max(1, shared.batch_size // shared.num_intervals) if args.budget == "share" else shared.batch_size


def _arguments(
    task: int, seed: int, args: argparse.Namespace, shared: _Shared, tracking: Mapping[str, str | None]
) -> list[str]:
    """Command line of one training, after ``dtr-lab train``."""
    settings: dict[str, Any] = {
        "config": args.config,
        "seed_everything": seed,
        "progress.style": "lines",
        **{f"{probe}.every_n_steps": 0 for probe in _QUIET},
    }
    settings |= dict(text.split("=", 1) for text in args.settings)
    settings |= {
        "model.init_args.intervals.only": task,
        "model.init_args.balancing.method": "none",  # one task has nothing to balance
        "data.init_args.batch_size": _batch_size(args, shared),
        "tracking.experiment": args.experiment or shared.experiment,
        "tracking.run_name": f"specialist-task{task}-seed{seed}",
        "tracking.comparison": args.comparison,
        "tracking.run_dir": args.run_dir,
        **{f"tracking.{key}": value for key, value in tracking.items()},
    }
    return [f"--{key}={value}" for key, value in settings.items() if value is not None]
