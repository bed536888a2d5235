"""``dtr-lab sweep``: a grid of settings, or a search for the best ones, from one file; it can be resumed."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.errors import UserInputError

if TYPE_CHECKING:
    from experiments.sweeping.cells import Place
    from experiments.sweeping.spec import Sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("--config", type=Path, required=True, help="the sweep file, as in experiments/mtl")
    parser.add_argument("--seeds", type=int, nargs="+", help="of each cell or trial (default: the file's)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="further settings for every training, such as trainer.max_steps=500",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CELL", help="train these cells only, by name or pattern ('dtr-*')"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan, train nothing")
    parser.add_argument("--no-compare", action="store_true", help="write no tables and figures at the end of a grid")
    parser.add_argument("--results", type=Path, help="folder for them (default: RUN_DIR/sweeps/NAME)")
    parser.add_argument("--experiment", help="MLflow experiment (default: the file's)")
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side (default: %(default)s)")
    parser.add_argument("--tracking-uri", help="MLflow store (default: $MLFLOW_TRACKING_URI or sqlite:///mlflow.db)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="checkpoints (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Trains what is missing. Returns 1 if a training of a grid failed, or no trial of a search succeeded."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for chatty in ("mlflow.store.db.utils", "alembic"):  # they report the set-up of a new store line by line
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from experiments.sweeping.cells import Place
    from experiments.sweeping.spec import read_sweep
    from experiments.ui import ui_command
    from lightning_modules.tracking.store import check_store, resolve_tracking_uri

    if args.workers < 1:
        raise UserInputError(f"--workers must be at least 1, got {args.workers}")
    sweep = read_sweep(args.config, seeds=args.seeds, overrides=args.settings, experiment=args.experiment)
    if args.only and sweep.search is not None:
        raise UserInputError(f"--only names cells of a grid, but {sweep.path} is a search: leave it out")
    uri = resolve_tracking_uri(args.tracking_uri)
    check_store(uri)
    with _ends_as_by_ctrl_c():
        status = _run(sweep, Place(uri, args.run_dir), args)
    if not args.dry_run:
        print(f"\nOpen these runs in MLflow:\n  {ui_command(uri, sweep.experiment, sweep.name)}")
    return status


def _run(sweep: Sweep, place: Place, args: argparse.Namespace) -> int:
    from experiments.sweeping.grid import command_line, grid_plan, run_grid, said_of

    if sweep.search is not None:
        from experiments.sweeping.search import print_search_plan, run_search

        if args.dry_run:
            print_search_plan(sweep, place)
            return 0
        return run_search(sweep, place, workers=args.workers)
    if args.dry_run:
        steps = grid_plan(sweep, place, only=args.only, settle=False)
        width = max(len(step.run.name) for step in steps)
        for step in steps:
            print(f"  {step.run.name:<{width}}  {step.said}")
        print(said_of(sweep, steps))
        return 0
    experiment = [] if args.experiment is None else [args.experiment]
    options = [
        *(("--seeds", args.seeds or ()), ("--set", args.settings), ("--only", args.only)),
        ("--experiment", experiment),
    ]
    return run_grid(
        sweep,
        place,
        workers=args.workers,
        only=args.only,
        results=None if args.no_compare else args.results or place.folder(sweep),
        command=command_line(args.config, options),
    )


@contextmanager
def _ends_as_by_ctrl_c() -> Iterator[None]:
    """Lets SIGTERM (a batch system's) and SIGHUP (a closed terminal's) close the runs as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    in_charge = threading.current_thread() is threading.main_thread()
    kept = {}
    for number in (getattr(signal, name) for name in names):
        if in_charge and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP, and so shall we
            kept[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
