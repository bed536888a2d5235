"""MLflow -> one `xarray.Dataset` per training run, or its metrics as they were logged.

The only file of `analysis` that talks to MLflow.
"""

from __future__ import annotations

import difflib
import fnmatch
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import pandas as pd
import xarray as xr
from mlflow import MlflowClient
from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException

from analysis.axes import CURVE_COLUMNS, add_axes
from analysis.reading.shards import read_manifest
from analysis.reading.store import explained, locate_store, logged_runs
from analysis.reading.telemetry import read_telemetry
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records

LATEST = "latest"
FIDELITY = "fidelity/"
"""Prefix of the MLflow metrics of a run's samples (`experiments.sample_fidelity` logs them)."""
_SHOWN = 12
_LOADERS = 3
"""Runs that are read side by side; each reads its own shards by threads, too."""
_INFINITY = np.finfo(np.float64).max
"""What MLflow's databases keep in the place of an infinite metric."""


class RunsLeftOutWarning(UserWarning):
    """Some of the runs asked for are not among those loaded; the message says which and why."""


def load_runs(
    tracking_uri: str | None = None,
    *,
    experiment: str | None = None,
    comparison: str | None = None,
    run_ids: Sequence[str] | None = None,
    include_unfinished: bool = False,
    kind: str = records.KIND_TRAINING,
    missing_ok: bool = False,
) -> list[xr.Dataset]:
    """Loads training runs (tag ``dtr.kind`` = ``training``) with their telemetry.

    Args:
        tracking_uri: MLflow store; see `locate_store`.
        experiment: Name of the experiment to search; needed unless ``run_ids`` are given.
        comparison: Only runs with this ``dtr.comparison`` tag; ``"latest"`` takes the newest comparison of the
            experiment (all its runs if none belongs to a comparison); None takes all.
        run_ids: Exactly these runs, finished or not (naming a run is asking for it); also measurements of
            `dtr-lab probe`, whose steps are batches.
        include_unfinished: Also load runs that are running, failed or killed. They are left out with a warning
            otherwise; in either case the attribute ``status`` tells.
        kind: Of the runs to search for: ``"training"``, or ``"specialist"`` for models trained on one task each.
        missing_ok: Whether to return nothing, rather than an error, where the search finds no run.

    Returns:
        One dataset per run, ordered by method, seed and start: the variables of `telemetry.read_telemetry`, and the
        attributes run_id, name, method, seed, dataset, experiment, comparison, cell (of a sweep: see
        `records.cell_choices`; else empty), status, start_time (milliseconds since the epoch), fidelity (a dict of the
        MLflow metrics ``fidelity/<name>`` of its samples; infinite if sampling diverged) and manifest (JSON).

    Raises:
        UserInputError: If the store, experiment, comparison or a run does not exist, or no run has telemetry to read.
    """
    uri = locate_store(tracking_uri)
    client = MlflowClient(tracking_uri=uri)
    with explained(uri):
        if run_ids is not None:
            found = chosen = [_get_run(client, run_id) for run_id in run_ids]
        elif experiment is not None:
            found = _search(client, _experiment_named(client, experiment), comparison, kind, missing_ok)
            chosen = found if include_unfinished else _finished_only(found)
        else:
            raise UserInputError(f"name an experiment or run ids to load; experiments here: {_experiments(client)}")
        names = {each: client.get_experiment(each).name for each in {run.info.experiment_id for run in chosen}}
        with ThreadPoolExecutor(_LOADERS) as loaders:
            loaded = list(loaders.map(lambda run: _load(client, run, names[run.info.experiment_id]), chosen))
    for run, dataset in zip(chosen, loaded, strict=True):
        if dataset is None:
            message = f"left out run {run.info.run_name} ({run.info.run_id}): no telemetry"
            warnings.warn(message, RunsLeftOutWarning, stacklevel=2)
    runs = [run for run in loaded if run is not None]
    if not runs and not (missing_ok and not chosen):
        raise UserInputError(_nothing_to_read(uri, found, chosen))
    return sorted(runs, key=lambda run: (run.attrs["method"], run.attrs["seed"], run.attrs["start_time"]))


def _experiments(client: MlflowClient) -> str:
    names = sorted(found.name for found in client.search_experiments())
    return _listed(names) or "none"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _experiment_named(client: MlflowClient, name: str) -> Experiment:
    found = client.get_experiment_by_name(name)
    if found is None:
        raise UserInputError(
            f"no experiment {name!r} in {client.tracking_uri}; there are: {_experiments(client)} "
            "(`make demo` makes the runs of 'digits-demo')"
        )
    return found


def _get_run(client: MlflowClient, run_id: str) -> Run:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise UserInputError(
            f"no run {run_id!r} in this store: pass a full run id as the MLflow UI shows it ({error.message})"
        ) from error
    if run.data.tags.get(records.TAG_KIND) not in (
        records.KIND_TRAINING,
        records.KIND_SPECIALIST,
        records.KIND_PROBE,
    ):
        raise UserInputError(f"run {run_id!r} ({run.info.run_name}) is not a training run or probe of DTR Lab")
    return run


def _search(
    client: MlflowClient, experiment: Experiment, comparison: str | None, kind: str, missing_ok: bool
) -> list[Run]:
    """All runs of a kind in the experiment, newest first, or those of one comparison."""
    runs = logged_runs(client, experiment.experiment_id, kind=kind)[::-1]
    if not runs and missing_ok:
        return []
    if not runs:
        command = "dtr-lab specialists" if kind == records.KIND_SPECIALIST else "dtr-lab train"
        raise UserInputError(f"experiment {experiment.name!r} has no {kind} runs: make some with `{command}`")
    if comparison is None:
        return runs
    known = list(dict.fromkeys(tag for run in runs if (tag := run.data.tags.get(records.TAG_COMPARISON))))
    if comparison == LATEST:
        if not known:
            return runs
        comparison = known[0]
    if comparison not in known and not missing_ok:
        raise UserInputError(
            f"no comparison {comparison!r} in experiment {experiment.name!r}; there are: {_listed(known) or 'none'}"
        )
    return [run for run in runs if run.data.tags.get(records.TAG_COMPARISON, "") == comparison]


def _finished_only(runs: list[Run]) -> list[Run]:
    left_out = [run for run in runs if run.info.status != "FINISHED"]
    if left_out:
        listed = ", ".join(f"{run.info.run_name} ({run.info.status})" for run in left_out[:_SHOWN])
        warnings.warn(
            f"left out {len(left_out)} unfinished of {len(runs)} runs: {listed}; "
            "include_unfinished=True (--include-unfinished) loads them too",
            RunsLeftOutWarning,
            stacklevel=4,
        )
    return [run for run in runs if run.info.status == "FINISHED"]


def _nothing_to_read(uri: str, found: Sequence[Run], chosen: Sequence[Run]) -> str:
    """What to say where none of the runs found could be loaded; ``chosen`` are those that were tried."""
    said = f"none of the {len(found)} training runs found in {uri} can be loaded"
    statuses = Counter(run.info.status for run in found) - Counter(run.info.status for run in chosen)
    if statuses:
        listed = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        said += (
            f"; left out {statuses.total()} unfinished ({listed}), which --include-unfinished "
            "(include_unfinished=True) loads too"
        )
    if chosen:
        said += f"; {len(chosen)} without telemetry"
    return said if statuses else f"{said}: train with `dtr-lab train` or `make demo`"


def _load(client: MlflowClient, run: Run, experiment: str) -> xr.Dataset | None:
    """The run's dataset, or None if it never committed telemetry."""
    with _telemetry_folder(client, run) as folder:
        if not (folder / Path(records.MANIFEST_PATH).name).is_file():
            return None
        manifest = read_manifest(folder)
        dataset = read_telemetry(folder)
        if not _in_place(run):
            dataset.load()  # the download goes
    dataset.attrs.update(
        run_id=run.info.run_id,
        name=run.info.run_name,
        method=manifest.method,
        seed=manifest.seed,
        dataset=manifest.dataset,
        experiment=experiment,
        comparison=run.data.tags.get(records.TAG_COMPARISON, ""),
        cell=run.data.tags.get(records.TAG_CELL, ""),
        fidelity=_fidelity(run),
        status=run.info.status,
        start_time=run.info.start_time,
    )
    return dataset


def _fidelity(run: Run) -> dict[str, float]:
    found = {key: value for key, value in run.data.metrics.items() if key.startswith(FIDELITY)}
    return {key.removeprefix(FIDELITY): value if abs(value) < _INFINITY else np.inf for key, value in found.items()}


def _in_place(run: Run) -> bool:
    """Whether the run's artifacts lie on this machine."""
    return urlparse(run.info.artifact_uri).scheme in ("", "file")


@contextmanager
def _telemetry_folder(client: MlflowClient, run: Run) -> Iterator[Path]:
    """The run's telemetry as a local folder: in place where artifacts lie on this machine, else a download."""
    if _in_place(run):
        location = urlparse(run.info.artifact_uri)
        root = url2pathname(location.path) if location.scheme == "file" else run.info.artifact_uri
        yield Path(root) / records.TELEMETRY_DIR
        return
    with tempfile.TemporaryDirectory(prefix="dtr-lab-") as download:
        if any(item.path == records.TELEMETRY_DIR for item in client.list_artifacts(run.info.run_id)):
            client.download_artifacts(run.info.run_id, records.TELEMETRY_DIR, download)
        yield Path(download) / records.TELEMETRY_DIR


def metric_curves(
    runs: Sequence[xr.Dataset], keys: str | Sequence[str] | None = None, tracking_uri: str | None = None
) -> pd.DataFrame:
    """Metrics as they were logged to MLflow, by DTR Lab or anyone (FID, say), in the form of `frames.curves_frame`.

    Where a run has several values of a metric at one step, as a resumed one may, the one logged last counts.

    Args:
        runs: Of `load_runs`.
        keys: Names of metrics, or patterns such as ``"loss/*"``; by default all that each run has.
        tracking_uri: The store they were loaded from; see `locate_store`.

    Returns:
        Columns `axes.CURVE_COLUMNS`, ordered by run, metric and step. Values that are not finite stay.

    Raises:
        UserInputError: If a run is not in the store, or has no metric of a name or pattern; similar ones are named.
    """
    uri = locate_store(tracking_uri)
    client = MlflowClient(tracking_uri=uri)
    pieces = []
    with explained(uri):
        for run in runs:
            run_id = run.attrs["run_id"]
            logged = sorted(_get_run(client, run_id).data.metrics)
            for key in logged if keys is None else _matching(run, [keys] if isinstance(keys, str) else keys, logged):
                points = sorted(client.get_metric_history(run_id, key), key=lambda point: (point.step, point.timestamp))
                last = {point.step: point.value for point in points}
                labels = {"run": run_id, "method": run.attrs["method"], "seed": run.attrs["seed"], "metric": key}
                pieces.append(pd.DataFrame({"step": list(last), "value": list(last.values())}).assign(**labels))
    if not pieces:
        return pd.DataFrame(columns=CURVE_COLUMNS)
    curves = add_axes(pd.concat(pieces, ignore_index=True), runs)
    curves["value"] = curves["value"].where(curves["value"].abs() != _INFINITY, np.sign(curves["value"]) * np.inf)
    return curves


def _matching(run: xr.Dataset, wanted: Sequence[str], logged: Sequence[str]) -> list[str]:
    """The metrics wanted of a run, each once."""
    found: dict[str, None] = {}
    for pattern in wanted:
        own = [key for key in logged if fnmatch.fnmatchcase(key, pattern)]
        if not own:
            near = difflib.get_close_matches(pattern, logged, n=_SHOWN, cutoff=0.5) or logged
            name = f"{run.attrs['name']} ({run.attrs['run_id'][:8]})"
            raise UserInputError(f"run {name} has no metric {pattern!r}; it has {_listed(near) or 'none at all'}")
        found |= dict.fromkeys(own)
    return sorted(found)
