"""Searches for the best settings: the command around `searching.Searching`, from the plan to the best settings."""

from __future__ import annotations

import csv
import difflib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.mlflow_notes import NOTE_TAG
from experiments.sweeping.cells import Cell, CheckedCell, Place
from experiments.sweeping.checking import checked_cells
from experiments.sweeping.locks import sole_sweep
from experiments.sweeping.parent import report_failed, under_parent
from experiments.sweeping.plan import checkpoints_of
from experiments.sweeping.searching import Searching, trial_cell, trial_settings
from experiments.sweeping.settings import merged, nested
from experiments.sweeping.spec import Sweep
from experiments.sweeping.store import KnownRun, up_to_date
from experiments.sweeping.study import SearchStudy
from experiments.trainings import run_trainings
from lightning_modules.folders import writable_folder
from lightning_modules.tracking.store import mlflow_client

BEST = "best.yaml"
TRIALS = "trials.csv"
_USUAL_METRICS = (
    "loss/val",
    "loss/val_vb",
    "loss/train",
    "conflict/rate",
    "conflict/mean_rate",
    "conflict/mean_cosine",
)


def print_search_plan(sweep: Sweep, place: Place) -> None:
    """Checks the search and prints what it would do."""
    assert sweep.search is not None
    base, _ = _checked_base(sweep, place, ())
    for key, parameter in sweep.search.parameters.items():
        among = f"one of {list(parameter.choices)}" if parameter.choices else f"{parameter.low} to {parameter.high}"
        print(f"  {key}: {among}{' (logarithmic)' if parameter.log else ''}")
    ended = going = 0
    if _study_path(sweep, place).exists():
        study = _study(sweep, place, base)
        ended, going = len(study.ended()), len(study.interrupted())
    left = max(0, sweep.search.trials - ended - going)
    print(
        f"Search {sweep.name}: {sweep.search.direction} {sweep.search.metric} over {sweep.search.trials} trials x "
        f"{len(sweep.seeds)} seeds of {base.max_steps} steps: {ended} ended, {going} going on, {left} to try."
    )


def run_search(sweep: Sweep, place: Place, *, workers: int) -> int:
    """Tries settings until there are as many trials as the file says, and writes down the best.

    Returns:
        Exit status: 1 if no trial has succeeded.

    Raises:
        UserInputError: If the search cannot be made as it stands; or, after the first trial, if the runs do not log
            the metric.
    """
    assert sweep.search is not None
    trials = sweep.search.trials
    folder = writable_folder(place.folder(sweep), "--run-dir")
    with sole_sweep(folder) as inherited:
        known = up_to_date(sweep, place)
        base, steps = _checked_base(sweep, place, known)
        study = _study(sweep, place, base)
        study.drop_undrawn()

        def work(place: Place) -> bool:
            searching = Searching(sweep, place, study, base, known, steps)
            print(
                f"Search {sweep.name}: {trials} trials x {len(sweep.seeds)} seeds: {len(study.ended())} ended, "
                f"{len(searching.interrupted)} going on, {searching.untried} to try."
            )
            failed = run_trainings(
                searching.trainings(),
                workers,
                go_on=True,
                total=searching.expected or None,
                ended=searching.ended,
                inherited=inherited,
            )
            report_failed(failed)
            return _conclude(sweep, place, study, base)

        return 0 if under_parent(sweep, place, work) else 1


def _study_path(sweep: Sweep, place: Place) -> Path:
    return place.folder(sweep).with_name(f"{sweep.name}.db")


def _study(sweep: Sweep, place: Place, base: CheckedCell) -> SearchStudy:
    """The study, which knows by everything that decides on its trials whether it is the same search."""
    assert sweep.search is not None
    search = sweep.search
    described: dict[str, Any] = {
        "metric": search.metric,
        "direction": search.direction,
        "sampler": search.sampler,
        "sampler_seed": search.seed,
        "seeds": list(sweep.seeds),
        "parameters": {key: vars(parameter) for key, parameter in search.parameters.items()},
        "settings": base.resolved,
    }
    return SearchStudy(_study_path(sweep, place), sweep.name, search, described)


def _checked_base(sweep: Sweep, place: Place, known: Sequence[KnownRun]) -> tuple[CheckedCell, dict[Path, int]]:
    """The settings at the first end of every range, after the parser has seen every end of each; and checkpoints."""
    assert sweep.search is not None
    metric = sweep.search.metric
    near = difflib.get_close_matches(metric, _USUAL_METRICS, n=1, cutoff=0.8)
    if near and metric not in _USUAL_METRICS:  # no error: a callback of the user's may log it
        print(f"Note: search.metric is {metric!r}, which DTR Lab does not log by itself; do you mean {near[0]!r}?")
    ends = {key: parameter.ends for key, parameter in sweep.search.parameters.items()}
    first = {key: values[0] for key, values in ends.items()}
    tried: dict[str, Mapping[str, Any]] = {"a trial": first}
    for key, values in ends.items():
        tried |= {f"{key} = {value}": {**first, key: value} for value in values[1:]}
    cells = [Cell(name, {}, merged(sweep.settings, values, sweep.overrides)) for name, values in tried.items()]
    checked, steps = checked_cells(sweep, place, cells, checkpoints_of(known, place))
    return checked[0], steps


def _conclude(sweep: Sweep, place: Place, study: SearchStudy, base: CheckedCell) -> bool:
    """Writes and prints the best settings; False if no trial has succeeded."""
    assert sweep.search is not None
    assert place.parent is not None
    folder = place.folder(sweep)
    _write_trials(study, folder / TRIALS)
    client = mlflow_client(place.uri)
    client.log_artifact(place.parent, str(folder / TRIALS), "sweep")
    best = study.best()
    if best is None:
        print(f"No trial of {sweep.name} has succeeded.")
        return False
    trial, value = best
    mean = f" (mean over seeds {', '.join(map(str, sweep.seeds))})" if len(sweep.seeds) > 1 else ""
    said = f"Best of {len(study.ended())} trials: trial {trial.number}, {sweep.search.metric} = {value:.6g}{mean}"
    path = folder / BEST
    text = yaml.safe_dump(nested(trial_settings(sweep, trial)), sort_keys=False)
    path.write_text(f"# {said}\n{text}", encoding="utf-8")
    client.log_artifact(place.parent, str(path), "sweep")
    client.set_tag(place.parent, NOTE_TAG, f"{said}.\n\n```yaml\n{text}```")
    print(f"\n{said}")
    for key, chosen in trial.parameters.items():
        print(f"  {key}: {chosen}")
    print(f"Train it:\n  {_command(sweep, path, trial_cell(sweep, base, trial))}")
    return True


def _command(sweep: Sweep, best: Path, trial: CheckedCell) -> str:
    """The training of the best trial with its first seed, as one types it."""
    seed = sweep.seeds[0]
    near = [os.path.relpath(path) for path in (*sweep.configs, best)]
    configs = [str(Path(path).resolve()) if path.startswith("..") else path for path in near]
    seeds = [f"--{key}={seed}" for key in ("seed_everything", *trial.seeded)]
    return shlex.join(["dtr-lab", "train", *(f"--config={path}" for path in configs), *seeds])


def _write_trials(study: SearchStudy, path: Path) -> None:
    """One row for each trial that has ended."""
    keys = list(study.search.parameters)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["trial", "state", study.search.metric, *keys])
        for trial in study.ended():
            table.writerow([trial.number, trial.state.name, trial.value, *(trial.params[key] for key in keys)])
