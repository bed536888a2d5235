"""The runs of a sweep that the MLflow store holds already, whatever became of them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from analysis.reading.store import logged_runs
from experiments.sweeping.cells import Place
from experiments.sweeping.spec import Sweep
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from lightning_modules.tracking.store import mlflow_client, sqlite_path
from lightning_modules.tracking.sync import sync

if TYPE_CHECKING:
    from mlflow.entities import Run

FINISHED = "FINISHED"
RUNNING = "RUNNING"


@dataclasses.dataclass(frozen=True)
class KnownRun:
    """A run that an earlier call of the command began.

    Attributes:
        run_id: Its MLflow id.
        name: Its name.
        status: MLflow's.
        cell: The tag `records.TAG_CELL`.
        seed: Its seed.
        identity: The tag `records.TAG_SETTINGS`.
        metrics: Metric -> its last value.
    """

    run_id: str
    name: str
    status: str
    cell: str
    seed: int
    identity: str
    metrics: dict[str, float]


def known_runs(sweep: Sweep, uri: str) -> list[KnownRun]:
    """All runs of the sweep that are not deleted; none, and nothing is created, where the store does not exist yet."""
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return []
    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name(sweep.experiment)
    if experiment is None:
        return []
    runs = logged_runs(client, experiment.experiment_id, comparison=sweep.name)
    return [_known(run) for run in runs if records.TAG_CELL in run.data.tags]


def up_to_date(sweep: Sweep, place: Place) -> list[KnownRun]:
    """`known_runs`, after those that ended without telling MLflow have been made to.

    Raises:
        UserInputError: If a run is still being trained, here or elsewhere.
    """
    runs = known_runs(sweep, place.uri)
    told = False
    for run in runs:
        spool = place.run_dir / run.run_id / "spool"
        if run.status != FINISHED and (spool / "run.json").is_file():
            sync(place.run_dir / run.run_id, place.uri)
            told = True
        elif run.status == RUNNING:
            raise UserInputError(
                f"run {run.name} ({run.run_id}) is marked as running, but {place.run_dir} holds nothing of it: if it "
                "is trained elsewhere wait for its end, if its files are elsewhere give --run-dir, else delete it in "
                "MLflow"
            )
    return known_runs(sweep, place.uri) if told else runs


def configuration_of(run: KnownRun, uri: str) -> dict[str, Any]:
    """The whole configuration that a run was started with; empty if it left none."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="dtr-lab-") as folder:
        try:
            path = mlflow_client(uri).download_artifacts(run.run_id, records.CONFIG_PATH, folder)
            return yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (MlflowException, OSError, yaml.YAMLError):
            return {}


def set_aside(runs: Sequence[KnownRun], uri: str) -> None:
    """Deletes runs in MLflow's sense: they are shown no more, and ``mlflow runs restore`` brings them back."""
    if runs:
        client = mlflow_client(uri)
        for run in runs:
            client.delete_run(run.run_id)


def _known(run: Run) -> KnownRun:
    tags = run.data.tags
    return KnownRun(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        cell=tags[records.TAG_CELL],
        seed=int(tags.get(records.TAG_SEED, -1)),
        identity=tags.get(records.TAG_SETTINGS, ""),
        metrics=dict(run.data.metrics),
    )
