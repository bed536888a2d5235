"""Trains the cells of a grid that are not trained yet, and tabulates all of them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from experiments.sweeping.cells import Cell, Place, grid_cells, training
from experiments.sweeping.checking import checked_cells
from experiments.sweeping.locks import sole_sweep
from experiments.sweeping.parent import report_failed, under_parent
from experiments.sweeping.plan import Step, checkpoints_of, planned, refuse_other_settings
from experiments.sweeping.spec import Sweep
from experiments.sweeping.store import FINISHED, known_runs, set_aside, up_to_date
from experiments.trainings import Training, run_trainings
from lightning_modules.errors import UserInputError
from lightning_modules.folders import writable_folder


def run_grid(
    sweep: Sweep, place: Place, *, workers: int, only: Sequence[str] = (), results: Path | None, command: str
) -> int:
    """Trains what is missing, then writes the results.

    Args:
        sweep: The grid.
        place: Where its runs go.
        workers: Trainings side by side.
        only: Names of cells, or patterns of them; all if empty.
        results: Folder for tables and figures; None for none.
        command: The command line, for the report.

    Returns:
        Exit status: 1 if a training failed or is not finished.

    Raises:
        UserInputError: Before anything is trained, if the grid cannot be trained as it stands.
    """
    folder = writable_folder(place.folder(sweep), "--run-dir")
    if results is not None:
        writable_folder(results, "--results")
    with sole_sweep(folder) as inherited:
        steps = grid_plan(sweep, place, only=only, settle=True)
        print(said_of(sweep, steps))

        def work(place: Place) -> bool:
            set_aside([run for step in steps for run in step.superseded], place.uri)
            missing = [step for step in steps if step.finished is None]
            failed: list[Training] = []
            if missing:
                failed = run_trainings(
                    _trainings(sweep, place, missing), workers, go_on=True, total=len(missing), inherited=inherited
                )
            complete = not report_failed(failed) and _all_finished(sweep, place, steps)
            if results is not None:
                _write(sweep, place, results, command)
            return complete

        return 0 if under_parent(sweep, place, work) else 1


def grid_plan(sweep: Sweep, place: Place, *, only: Sequence[str], settle: bool) -> list[Step]:
    """What there is to do for each run, seed by seed, so that whole tables come early.

    Args:
        sweep: The grid.
        place: Where its runs go.
        only: Names of cells, or patterns of them; all if empty.
        settle: Whether runs that died are first marked so in MLflow.

    Raises:
        UserInputError: If a cell is refused by the trainer, or was trained with other settings.
    """
    cells = grid_cells(sweep)
    chosen = _chosen(sweep, cells, only)
    known = up_to_date(sweep, place) if settle else known_runs(sweep, place.uri)
    print(f"Checking {len(cells)} cells …", flush=True)
    checked, at = checked_cells(sweep, place, cells, checkpoints_of(known, place))
    refuse_other_settings(sweep, checked, known, at, place)
    runs = [each.runs([seed])[0] for seed in sweep.seeds for each in checked if each.cell.name in chosen]
    return [planned(run, known, at, place) for run in runs]


def said_of(sweep: Sweep, steps: Sequence[Step]) -> str:
    """The plan in a sentence or two."""
    kinds = Counter(
        "finished" if step.finished is not None else "going on" if step.checkpoint is not None else "to train"
        for step in steps
    )
    seeds = len({step.run.seed for step in steps})
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in ("finished", "going on", "to train") if kinds[kind])
    text = f"Sweep {sweep.name}: {len(steps) // seeds} cells x {seeds} seeds: {counts}."
    superseded = [run for step in steps for run in step.superseded]
    if superseded:
        runs = f"{len(superseded)} unfinished run{'s' * (len(superseded) > 1)}"
        text += (
            f"\n{runs} that cannot be gone on with will be deleted in MLflow before training "
            f"(`mlflow runs restore --run-id ID` brings one back): {', '.join(run.run_id for run in superseded)}"
        )
    return text


def _chosen(sweep: Sweep, cells: Sequence[Cell], only: Sequence[str]) -> set[str]:
    names = [cell.name for cell in cells]
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserInputError(f"--only {pattern}: no such cell in {sweep.path}; there are: {', '.join(names)}")
    return {name for name in names if not only or any(fnmatchcase(name, pattern) for pattern in only)}


def _trainings(sweep: Sweep, place: Place, steps: Sequence[Step]) -> Iterator[Training]:
    for step in steps:
        yield training(sweep, place, step.run, step.checkpoint)


def _all_finished(sweep: Sweep, place: Place, steps: Sequence[Step]) -> bool:
    """Whether MLflow has all of them: a training may have ended well while the server was away."""
    done = {(run.cell, run.identity) for run in up_to_date(sweep, place) if run.status == FINISHED}
    missing = [step.run.name for step in steps if (step.run.checked.cell.tag, step.run.identity) not in done]
    if missing:
        print(f"Not finished in MLflow: {', '.join(missing)}; the same command goes on with them.")
    return not missing


def _write(sweep: Sweep, place: Place, results: Path, command: str) -> None:
    from experiments.grid_results import write_results

    if not any(run.status == FINISHED for run in known_runs(sweep, place.uri)):
        return
    axes = {axis: list(choices) for axis, choices in sweep.axes.items()}
    write_results(
        place.uri,
        experiment=sweep.experiment,
        comparison=sweep.name,
        axes=axes,
        out=results,
        command=command,
        run_dir=place.run_dir,
        samples=sweep.samples,
    )
    print(f"\nResults: {results}")


def command_line(path: Path, options: Sequence[tuple[str, Sequence[object]]]) -> str:
    """The command that would do this again, as one types it."""
    given = [[name, *(str(value) for value in values)] for name, values in options if values]
    return shlex.join(["dtr-lab", "sweep", "--config", str(path), *(word for words in given for word in words)])
