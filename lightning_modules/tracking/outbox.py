"""From the training thread's hands onto the disk: buffers, and the thread that empties them into the spool."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_modules.tracking import records
from lightning_modules.tracking.shards import shard_bytes
from lightning_modules.tracking.spool import Spool, SpoolItem

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 2.0
_ROWS_SECONDS = 20.0  # every shard is a file to list and fetch, so they had better be few
_LARGE_METRICS = 5_000
_LARGE_ROW_BYTES = 16_000_000
_LARGE_IMAGES = 8

MetricPoint = tuple[str, float, int, int]
"""Key, value, time of measurement in ms, step."""


class _Buffers:
    """What was handed over since the last flush."""

    def __init__(self) -> None:
        self.metrics: list[MetricPoint] = []
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.files: list[tuple[str, bytes]] = []
        self.images: list[tuple[dict[str, Any], np.ndarray]] = []
        self.rows: list[tuple[str, pa.RecordBatch]] = []
        self.row_bytes = 0


class Outbox:
    """Takes entries in microseconds and writes them to a spool every two seconds, rows every twenty.

    Args:
        spool: Where to.
        attempt: Noted in every item and shard.
        resumed_from: Noted in every shard.
        on_spooled: Called after each flush.
    """

    def __init__(self, spool: Spool, attempt: int, resumed_from: int, on_spooled: Callable[[], None]) -> None:
        self._spool = spool
        self._attempt = attempt
        self._resumed_from = resumed_from
        self._on_spooled = on_spooled
        self._lock = threading.Lock()  # guards the buffers
        self._flush_lock = threading.Lock()  # keeps items in the order of hand-over
        self._buffers = _Buffers()
        self._taken: deque[_Buffers] = deque()
        self._rows: dict[str, list[pa.RecordBatch]] = {}
        self._rows_written = time.monotonic()
        self._shards = 0
        self._unspooled: deque[SpoolItem] = deque()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()

    def add_metrics(self, points: list[MetricPoint]) -> None:
        """Takes metric values."""
        with self._open_buffers() as buffers:
            buffers.metrics.extend(points)
            if len(buffers.metrics) > _LARGE_METRICS:
                self._wake.set()

    def add_rows(self, table: str, batch: pa.RecordBatch) -> None:
        """Takes rows of a telemetry table."""
        with self._open_buffers() as buffers:
            buffers.rows.append((table, batch))
            buffers.row_bytes += batch.nbytes
            if buffers.row_bytes > _LARGE_ROW_BYTES:
                self._wake.set()

    def add_image(self, header: dict[str, Any], image: np.ndarray) -> None:
        """Takes an image, uint8 (H, W, 3), with the header of its `SpoolItem`; it is not copied."""
        with self._open_buffers() as buffers:
            buffers.images.append((header, image))
            if len(buffers.images) > _LARGE_IMAGES:
                self._wake.set()

    def add_file(self, path_in_run: str, content: bytes) -> None:
        """Takes a file."""
        with self._open_buffers() as buffers:
            buffers.files.append((path_in_run, content))

    def add_texts(self, *, params: dict[str, str] | None = None, tags: dict[str, str] | None = None) -> None:
        """Takes parameters and tags."""
        with self._open_buffers() as buffers:
            buffers.params.update(params or {})
            buffers.tags.update(tags or {})

    def start(self) -> None:
        """Opens the outbox and starts its thread."""
        self._wake.clear()
        self._thread = threading.Thread(target=self._loop, name="dtr-spooler", daemon=True)
        self._thread.start()

    def stop(self, last: SpoolItem) -> None:
        """Closes the outbox and flushes it, with one more item at the very end.

        Raises:
            OSError: If the disk does not take it.
        """
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._wake.set()
            thread.join()
        self.flush(last=last)

    def flush(self, rows_due: bool = True, last: SpoolItem | None = None) -> None:
        """Everything taken so far is on disk when this returns.

        Args:
            rows_due: Whether rows are written too, or may wait for more of their kind.
            last: One more item.

        Raises:
            OSError: If the disk does not take it; what is not written yet stays queued for the next flush.
        """
        with self._flush_lock:
            with self._lock:
                large = self._buffers.row_bytes > _LARGE_ROW_BYTES
                self._taken.append(self._buffers)
                self._buffers = _Buffers()
            while self._taken:
                items = self._items(self._taken[0])  # takes time; if Ctrl-C breaks it off, `stop` does it again
                taken = self._taken.popleft()
                self._unspooled.extend(items)
                for table, batch in taken.rows:
                    self._rows.setdefault(table, []).append(batch)
            if rows_due or large:
                self._unspooled.extend(self._shard_items())
            if last is not None:
                self._unspooled.append(last)
            while self._unspooled:
                self._spool.put(self._unspooled[0])
                self._unspooled.popleft()
        self._on_spooled()

    @contextmanager
    def _open_buffers(self) -> Iterator[_Buffers]:
        with self._lock:
            if self._thread is None:
                raise RuntimeError("the run was closed: reopen its writer before logging more")
            yield self._buffers

    def _loop(self) -> None:
        failing = False
        while self._thread is not None:
            self._wake.wait(_FLUSH_SECONDS)
            self._wake.clear()
            try:
                self.flush(rows_due=time.monotonic() - self._rows_written > _ROWS_SECONDS)
                failing = False
            except Exception as error:  # the thread must live on: a full disk may have room again
                if not failing:
                    log.warning("telemetry stays in memory: cannot write to %s: %s", self._spool.directory, error)
                failing = True

    def _items(self, buffers: _Buffers) -> list[SpoolItem]:
        items = []
        if buffers.metrics or buffers.params or buffers.tags:
            header = {"metrics": buffers.metrics, "params": buffers.params, "tags": buffers.tags}
            items.append(SpoolItem("batch", self._attempt, header))
        for path, content in buffers.files:
            items.append(SpoolItem("file", self._attempt, {"path": path}, content))
        for image_header, image in buffers.images:
            items.append(SpoolItem("image", self._attempt, image_header, _png(image)))
        return items

    def _shard_items(self) -> list[SpoolItem]:
        items = []
        for table, batches in self._rows.items():
            path = f"{records.TELEMETRY_DIR}/{table}/a{self._attempt:03d}-{self._shards:06d}.parquet"
            content = shard_bytes(table, batches, self._attempt, self._resumed_from)
            items.append(SpoolItem("rows", self._attempt, {"path": path}, content))
            self._shards += 1
        self._rows = {}
        self._rows_written = time.monotonic()
        return items


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()
