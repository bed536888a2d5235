"""Where `dtr-lab affinity` puts what it measures: a folder, and the run in MLflow whose checkpoint it was.

Files first, MLflow after: everything goes through a spool in the folder, so what a store that is away does not take
is handed over later by ``dtr-lab sync``. A measure of one checkpoint is one file; measured again, it takes its place.
"""

from __future__ import annotations

import argparse
import io
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from experiments.measuring.measures import TABLE_OF, Rows
from experiments.probing.data import ProbeData
from experiments.probing.record import TAG_CHECKPOINT, TAG_TASKS, TAG_WEIGHTS, manifest_of
from experiments.probing.subject import Subject
from lightning_modules.errors import UserInputError
from lightning_modules.folders import writable_folder
from lightning_modules.timesteps import TimestepIntervals
from lightning_modules.tracking import records
from lightning_modules.tracking.publisher import published_images
from lightning_modules.tracking.shards import record_batch, shard_bytes
from lightning_modules.tracking.spool import SPOOL_DIR, Spool, SpoolItem
from lightning_modules.tracking.store import (
    check_store,
    ensure_experiment,
    mlflow_client,
    redacted,
    resolve_tracking_uri,
)
from lightning_modules.tracking.sync import remember_owner, sync

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)


class AffinityRecord:
    """The output of one checkpoint.

    Args:
        args: The options of the command.
        subject: The checkpoint.
        data: What it is measured on.
        intervals: The tasks.

    Raises:
        UserInputError: If the folder cannot be written to, the store cannot be used, or it lacks the checkpoint's run.
    """

    def __init__(
        self, args: argparse.Namespace, subject: Subject, data: ProbeData, intervals: TimestepIntervals
    ) -> None:
        self.subject = subject
        self._client: MlflowClient | None = None
        self._uri = ""
        run_id = subject.run_id
        if not args.no_tracking:
            self._uri = resolve_tracking_uri(args.tracking_uri)
            check_store(self._uri)
            self._client = mlflow_client(self._uri)
            if run_id is None:
                run_id = self._new_run(args.experiment, intervals)
            else:
                _check_run(self._client, self._uri, run_id, subject)
        self.run_id = run_id
        name = run_id if run_id is not None else subject.path.stem
        self.folder = writable_folder(args.out / name, "--out")
        self._spool = Spool(self.folder / SPOOL_DIR) if self._client is not None else None
        if self._spool is not None and run_id is not None:
            remember_owner(self._spool, run_id, self._uri, writes_run=subject.run_id is None)
        manifest = manifest_of(subject, data, intervals, args.batch_size).to_json().encode()
        if subject.run_id is None:
            self._keep(records.MANIFEST_PATH, manifest)
        else:  # its run has its own
            self.keep_file(records.MANIFEST_PATH, manifest)

    @property
    def step(self) -> int:
        """Steps that the checkpoint was trained for; 0 if it does not say."""
        return self.subject.step or 0

    def log_measure(self, measure: str, pieces: Sequence[Rows]) -> None:
        """Keeps all rows of a measure."""
        table = TABLE_OF[measure]
        batches = [record_batch(table, rows) for rows in pieces]
        content = shard_bytes(table, batches, self.subject.attempt, resumed_from=None)
        self._keep(f"{records.TELEMETRY_DIR}/{table}/{measure}-step-{self.step:08d}.parquet", content)

    def log_heatmap(self, key: str, image: np.ndarray) -> None:
        """Keeps a picture (H, W, 3) for MLflow's image slider, in the place of an earlier one of this checkpoint."""
        if self._spool is None or self._client is None or self.run_id is None:
            return
        _forget_images(self._client, self.run_id, key, self.step)
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        header = {"key": key, "step": self.step, "timestamp": time.time_ns() // 1_000_000}
        self._spool.put(SpoolItem("image", self.subject.attempt, header, buffer.getvalue()))

    def keep_file(self, name: str, content: bytes) -> None:
        """Writes a file to the folder alone."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def finish(self) -> str | None:
        """Hands everything over to MLflow; what to do if that failed, in words."""
        if self._spool is None:
            return None
        if self.subject.run_id is None:
            end = {"status": "FINISHED", "end_time": time.time_ns() // 1_000_000}
            self._spool.put(SpoolItem("status", self.subject.attempt, end))
        try:
            sync(self.folder, self._uri)
        except Exception as error:  # whatever a store that went away makes its client say
            first = str(error).strip().splitlines()[0]
            return (
                f"MLflow did not take everything ({first}); it is safe in {self._spool.directory}. When the store "
                f"answers, run: dtr-lab sync {self.folder}"
            )
        return None

    def _keep(self, path: str, content: bytes) -> None:
        self.keep_file(path, content)
        if self._spool is not None:
            self._spool.put(SpoolItem("file", self.subject.attempt, {"path": path}, content))

    def _new_run(self, experiment: str, intervals: TimestepIntervals) -> str:
        """A run of its own for a network that no run of this store trained."""
        assert self._client is not None
        module = self.subject.module
        tags = {
            records.TAG_KIND: records.KIND_PROBE,
            records.TAG_METHOD: module.method,
            records.TAG_SEED: str(module.seed),
            TAG_CHECKPOINT: str(self.subject.path.absolute()),
            TAG_WEIGHTS: self.subject.weights,
            TAG_TASKS: f"{intervals.num_intervals} intervals",
            "mlflow.note.content": f"**Task affinities of** `{self.subject.path}`, measured by `dtr-lab affinity`.",
        }
        experiment_id = ensure_experiment(self._client, self._uri, experiment)
        name = f"affinity {self.subject.path.stem}"
        return self._client.create_run(experiment_id, tags=tags, run_name=name).info.run_id


def _check_run(client: MlflowClient, uri: str, run_id: str, subject: Subject) -> Run:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        raise UserInputError(
            f"{subject.path} belongs to run {run_id}, which {redacted(uri)} does not have: name the store of that run "
            "with --tracking-uri, or measure without MLflow by --no-tracking"
        ) from error


def _forget_images(client: MlflowClient, run_id: str, key: str, step: int) -> None:
    """Removes what an earlier measurement of the same checkpoint drew."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    shown = published_images(client, run_id)
    stale = [image.stem for (name, at, _), image in shown.items() if (name, at) == (key, step)]
    if not stale:
        return
    repository = get_artifact_repository(client.get_run(run_id).info.artifact_uri)
    for artifact in client.list_artifacts(run_id, "images"):
        if any(Path(artifact.path).name.startswith(stem) for stem in stale):
            repository.delete_artifacts(artifact.path)
