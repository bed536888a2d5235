"""What training code and probes log through: one object per run, no waiting.

Three threads share the work. The training thread only appends to lists (`outbox`). The *spooler* turns the lists into
files of the spool every two seconds. The *publisher* sends the files to MLflow and deletes them (`delivery`); when the
server is away it tries again later, and only it waits. `RunWriter.commit` does the spooler's work at once, so that
nothing measured before a checkpoint can be lost after it.
"""

from __future__ import annotations

import atexit
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_modules.tracking.delivery import Delivery
from lightning_modules.tracking.names import check_artifact_path, check_image_name, check_metric_name, flat_params
from lightning_modules.tracking.outbox import MetricPoint, Outbox
from lightning_modules.tracking.resume import NONFINITE_COUNT, Published, already_published, drop_end, prune_leftovers
from lightning_modules.tracking.shards import Column, record_batch
from lightning_modules.tracking.spool import SPOOL_DIR, Spool, SpoolItem
from lightning_modules.tracking.sync import remember_owner

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

TAG_ATTEMPT = "dtr.attempt"
TAG_RESUMED_FROM = "dtr.resumed_from"
TAG_PARAM_DRIFT = "dtr.param_drift"

_MAX_TAG = 8000


class RunWriter:
    """Logs one run. No method but `close` waits for the store, none but `commit` and `close` for the disk.

    Args:
        client: Client of the store.
        run_id: The run, which exists.
        run_dir: Folder of all runs; this one's files lie in ``<run_dir>/<run_id>``.
        tracking_uri: Where the client leads, noted for a later `sync`.
        attempt: 1 for a new run, counted up by each resume.
        resumed_from: Step of the checkpoint this attempt starts from. What earlier attempts left unpublished beyond
            it is dropped, and (key, step) pairs of metrics and images published beyond it are not logged again.

    Raises:
        UserInputError: If another process is still writing this run.
        MlflowException: If a run to be resumed cannot be read from the store.
    """

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        run_dir: str | Path,
        tracking_uri: str,
        *,
        attempt: int = 1,
        resumed_from: int = 0,
    ) -> None:
        self.run_id = run_id
        self.directory = Path(run_dir).absolute() / run_id
        self.attempt = attempt
        self.resumed_from = resumed_from
        self._client = client
        self._known_names: set[str] = set()
        self._closed = False
        self._spool = Spool(self.directory / SPOOL_DIR)
        self._spool.acquire()
        try:
            remember_owner(self._spool, run_id, tracking_uri)
            waiting = prune_leftovers(self._spool, attempt, resumed_from)
            self._published = Published()
            if attempt > 1:
                self._published = already_published(client, run_id, resumed_from)
                # At once, not through the spool: two attempts with one number would overwrite each other's shards.
                client.set_tag(run_id, TAG_ATTEMPT, str(attempt))
                client.update_run(run_id, status="RUNNING")
        except BaseException:
            self._spool.release()
            raise
        self._published.params.update(waiting)
        self._nonfinite = self._published.nonfinite_count
        self._delivery = Delivery(client, run_id, self._spool)
        self._outbox = Outbox(self._spool, attempt, resumed_from, on_spooled=self._delivery.wake)
        self._start()
        self.set_tags({TAG_ATTEMPT: str(attempt), TAG_RESUMED_FROM: str(resumed_from)})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands over scalars measured now. NaN and infinities are left out and counted in ``health/nonfinite_count``.

        Raises:
            ValueError: If a name is one MLflow does not accept, or a value is no number.
        """
        now = _milliseconds()
        points: list[MetricPoint] = []
        nonfinite_before = self._nonfinite
        for key, value in metrics.items():
            if key not in self._known_names:
                check_metric_name(key)
                self._known_names.add(key)
            number = float(value)
            if not math.isfinite(number):
                self._nonfinite += 1
            else:
                points.append((key, number, now, int(step)))
        if self._nonfinite > nonfinite_before:
            points.append((NONFINITE_COUNT, float(self._nonfinite), now, int(step)))
        if self._published.metrics:
            points = [point for point in points if (point[0], point[3]) not in self._published.metrics]
        self._outbox.add_metrics(points)

    def log_rows(self, table: str, columns: Mapping[str, Column]) -> None:
        """Hands over rows of a telemetry table; the columns are copied.

        Args:
            table: A name in `records.TABLES`.
            columns: All columns of that table, each n values, or one int or str for all n rows; list columns also as
                an array ``(n, length)``.

        Raises:
            ValueError: If table or columns do not fit the schema.
        """
        batch = record_batch(table, columns)
        if batch.num_rows:
            self._outbox.add_rows(table, batch)

    def log_image(self, key: str, image: np.ndarray, step: int) -> None:
        """Hands over an image for the step slider of MLflow's UI, which shows it 256 pixels wide; it is copied.

        Args:
            key: Name of the series of images.
            image: uint8, (H, W, 3).
            step: Completed optimizer steps.

        Raises:
            ValueError: If the key is one MLflow does not accept or the array is no such image.
        """
        check_image_name(key)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"image {key!r} must be uint8 of shape (H, W, 3), got {image.dtype} {image.shape}")
        if (key, step) not in self._published.images:
            self._outbox.add_image({"key": key, "step": int(step), "timestamp": _milliseconds()}, image.copy())

    def log_file(self, path_in_run: str, data: bytes | str) -> None:
        """Hands over a file; a later one of the same path replaces it.

        Raises:
            ValueError: If the path leaves the run's artifacts or lies in ``images/``.
        """
        check_artifact_path(path_in_run)
        self._outbox.add_file(path_in_run, data.encode() if isinstance(data, str) else bytes(data))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Hands over tags of the run; later values replace earlier ones.

        Raises:
            ValueError: If a name is one MLflow does not accept.
        """
        for key in tags:
            check_metric_name(key)
        self._outbox.add_texts(tags={key: str(value)[:_MAX_TAG] for key, value in tags.items()})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Hands over the scalars of a nested configuration as flat dotted parameters, see `names.flat_params`.

        MLflow does not let a parameter change. One that differs from what the run has, as after a resume with other
        settings, is reported in the tag ``dtr.param_drift`` instead.

        Raises:
            ValueError: If a name is one MLflow does not accept.
        """
        flat = flat_params(params)
        known = self._published.params
        drift = [f"{key}: {known[key]} -> {new}" for key, new in sorted(flat.items()) if known.get(key, new) != new]
        fresh = {key: value for key, value in flat.items() if key not in known}
        known.update(fresh)
        self._outbox.add_texts(params=fresh)
        if drift:
            self.set_tags({TAG_PARAM_DRIFT: f"attempt {self.attempt}: {', '.join(drift)}"})

    def commit(self) -> None:
        """Returns once everything handed over so far is on disk, where it survives a crash of the process.

        Raises:
            OSError: If the disk does not take it.
        """
        self._outbox.flush()

    def close(self, status: str = "FINISHED", timeout: float = 30.0) -> None:
        """Ends the run: everything is put on disk and, as far as the store answers in time, published.

        What remains stays in the spool, with a warning that names the command which publishes it later.

        Args:
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
            timeout: Seconds to wait for the store.

        Raises:
            OSError: If the disk does not take it.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.commit)
        end = SpoolItem("status", self.attempt, {"status": status, "end_time": _milliseconds()})
        try:
            self._outbox.stop(end)
        finally:
            waiting = self._delivery.stop(timeout)
        if waiting:
            log.warning(
                "%d items of run %s could not be published and are safe in %s. When the tracking store answers, run:\n"
                "  dtr-lab sync %s",
                waiting,
                self.run_id,
                self._spool.directory,
                self.directory,
            )

    def reopen(self) -> None:
        """Continues a closed run in the same process, e.g. to validate after the training; the attempt stays.

        Raises:
            UserInputError: If the last `close` ran out of time and its call to the store still hangs.
        """
        if not self._closed:
            return
        self._spool.acquire()
        drop_end(self._spool)
        self._client.update_run(self.run_id, status="RUNNING")
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._delivery.start()
        self._outbox.start()
        atexit.register(self.commit)


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000
