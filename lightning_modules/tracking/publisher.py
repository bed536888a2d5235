"""Sends spooled items to MLflow, in order, each exactly once as far as a reader can tell.

Only `MlflowClient` is used, never the fluent API, whose hidden global state opens runs of its own. Replaying an item
after a crash is harmless: MLflow collapses metrics that agree in key, step, timestamp and value; files are
overwritten by themselves; images are looked up first.
"""

from __future__ import annotations

import io
import logging
import re
import shutil
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from lightning_modules.tracking.spool import Spool, SpoolItem

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_HOPELESS = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "MALFORMED_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}


class PublishedImage(NamedTuple):
    """The files that make up one image in ``images/``; MLflow's UI shows the small copy in its step slider."""

    stem: str
    has_full: bool
    has_small: bool


# MLflow writes <key>+step+<n>+timestamp+<ms>+<uuid>[+compressed].<type>, with "~" for "/" in the key; before 3.10
# the separator was "%". Neither separator can occur in a key.
_IMAGE_NAME = re.compile(
    r"^(?P<stem>(?P<key>[^+%]+)(?P<mark>[+%])step[+%](?P<step>-?\d+)[+%]timestamp[+%](?P<timestamp>\d+)[+%][0-9a-f-]+)"
    r"(?P<small>[+%]compressed)?\.(png|webp)$"
)


def published_images(client: MlflowClient, run_id: str) -> dict[tuple[str, int, int], PublishedImage]:
    """The images a run shows already, by (key, step, timestamp in ms)."""
    found: dict[tuple[str, int, int], PublishedImage] = {}
    for artifact in client.list_artifacts(run_id, "images"):
        match = _IMAGE_NAME.match(PurePosixPath(artifact.path).name)
        if match is None:
            continue
        identity = (match["key"].replace("~", "/"), int(match["step"]), int(match["timestamp"]))
        before = found.get(identity, PublishedImage(match["stem"], False, False))
        small = match["small"] is not None
        found[identity] = before._replace(has_full=before.has_full or not small, has_small=before.has_small or small)
    return found


def is_hopeless(error: Exception) -> bool:
    """Whether trying again can never help, as against a store that is away for a while."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

    if isinstance(error, MlflowException):
        cause = error.__cause__
        if isinstance(cause, SQLAlchemyError) and not isinstance(cause, DataError | IntegrityError):
            return False  # MLflow calls every database trouble a bad request, a full disk or a time-out included
        return error.error_code in _HOPELESS
    if isinstance(error, requests.exceptions.RequestException):
        response = error.response
        return response is not None and response.status_code in (400, 413, 422)
    return isinstance(error, ValueError | TypeError | KeyError)


class Publisher:
    """Empties the spool of one run into MLflow."""

    def __init__(self, client: MlflowClient, run_id: str, spool: Spool) -> None:
        self._client = client
        self._run_id = run_id
        self._spool = spool
        # An item may have been sent, wholly or in part, before a crash or a lost answer.
        self._maybe_sent: Path | None = next(iter(spool.pending()), None)

    def publish_pending(self, deadline: float | None = None) -> int:
        """Publishes what is in the spool, oldest first, and removes it.

        Items that MLflow will never accept go to ``rejected/`` with a warning, so that they do not block the rest.

        Args:
            deadline: `time.monotonic` time after which no further item is started.

        Returns:
            The number of items published.

        Raises:
            Exception: Whatever the client raises while the store is away; the item and all after it stay.
        """
        count = 0
        for path in self._spool.pending():
            if deadline is not None and time.monotonic() > deadline:
                break
            try:
                self._publish(self._spool.read(path), again=path == self._maybe_sent)
            except Exception as error:
                if not is_hopeless(error):
                    self._maybe_sent = path
                    raise
                moved = self._spool.reject(path)
                log.warning("MLflow refuses part of the telemetry; it is kept in %s: %s", moved, error)
                continue
            path.unlink()
            count += 1
        return count

    def _publish(self, item: SpoolItem, again: bool) -> None:
        if item.kind == "batch":
            self._publish_batch(item)
        elif item.kind == "image":
            self._publish_image(item, again)
        elif item.kind == "status":
            self._client.set_terminated(self._run_id, item.header["status"], item.header["end_time"])
        else:
            self._publish_file(item.header["path"], item.payload)

    def _publish_batch(self, item: SpoolItem) -> None:
        from mlflow.entities import Metric, Param, RunTag

        self._client.log_batch(
            self._run_id,
            metrics=[Metric(key, value, timestamp, step) for key, value, timestamp, step in item.header["metrics"]],
            params=[Param(key, value) for key, value in item.header["params"].items()],
            tags=[RunTag(key, value) for key, value in item.header["tags"].items()],
            synchronous=True,
        )

    def _publish_file(self, path_in_run: str, content: bytes) -> None:
        path = PurePosixPath(path_in_run)
        folder = self._spool.directory / "sending.tmp"
        folder.mkdir(exist_ok=True)
        try:
            (folder / path.name).write_bytes(content)
            parent = None if path.parent == PurePosixPath(".") else str(path.parent)
            self._client.log_artifact(self._run_id, str(folder / path.name), parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _publish_image(self, item: SpoolItem, again: bool) -> None:
        from PIL import Image

        key, step, timestamp = item.header["key"], item.header["step"], item.header["timestamp"]
        image = Image.open(io.BytesIO(item.payload))
        before = published_images(self._client, self._run_id).get((key, step, timestamp)) if again else None
        if before is None:
            self._client.log_image(self._run_id, image, key=key, step=step, timestamp=timestamp, synchronous=True)
            return
        # log_image names its files at random, so a second call would show the image twice: add only what is missing.
        mark = before.stem[len(key)]
        if not before.has_small:
            image.thumbnail((256, 256))
            buffer = io.BytesIO()
            image.save(buffer, "webp")
            self._publish_file(f"images/{before.stem}{mark}compressed.webp", buffer.getvalue())
        self._client.set_tag(self._run_id, "mlflow.loggedImages", "True", synchronous=True)
