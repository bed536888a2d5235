"""A directory used as a durable queue: what a run has measured and MLflow has not yet confirmed.

Each item is one sequence-numbered file, written under a temporary name, flushed to disk and renamed, so that a
reader sees whole items only and a crash loses none. Deleting the file acknowledges it. Items of a run that
crashed or lost its server simply stay, until the run is resumed or `sync.sync` sends them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any, Literal

from lightning_modules.errors import UserInputError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, so two processes on one run are not detected there
    fcntl = None  # type: ignore[assignment]

Kind = Literal["batch", "rows", "image", "file", "status"]

SPOOL_DIR = "spool"
_ITEM_NAME = re.compile(r"^(\d{9})\.(batch|rows|image|file|status)$")


@dataclasses.dataclass(frozen=True)
class SpoolItem:
    """One thing to publish.

    Attributes:
        kind: ``batch`` (metrics, params, tags), ``rows`` (a Parquet shard), ``image``, ``file`` or ``status``.
        attempt: The attempt of the run that measured it.
        header: JSON-serialisable description; the keys by kind are

            - batch: ``metrics`` (list of ``[key, value, timestamp_ms, step]``), ``params``, ``tags`` (both str to str)
            - rows, file: ``path`` inside the run's artifacts
            - image: ``key``, ``step``, ``timestamp`` (ms)
            - status: ``status``, ``end_time`` (ms)
        payload: The file's bytes (rows, file) or a PNG (image).
    """

    kind: Kind
    attempt: int
    header: dict[str, Any]
    payload: bytes = b""

    def to_bytes(self) -> bytes:
        """One line of JSON, then the payload."""
        return json.dumps({"attempt": self.attempt, **self.header}).encode() + b"\n" + self.payload

    @classmethod
    def from_bytes(cls, kind: Kind, content: bytes) -> SpoolItem:
        """Inverse of `to_bytes`."""
        line, _, payload = content.partition(b"\n")
        header = json.loads(line)
        return cls(kind, header.pop("attempt"), header, payload)


class Spool:
    """The queue in ``<run directory>/spool``. Not thread-safe for writers: one thread puts at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rejected_directory = directory / "rejected"
        self._lock_file: IO[str] | None = None
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        last = max((_sequence(path) for path in self.pending()), default=-1)
        self._next_sequence = last + 1

    def put(self, item: SpoolItem) -> Path:
        """Appends an item; it is on disk when this returns.

        Raises:
            OSError: If the disk does not take it; nothing is left behind then.
        """
        path = self.directory / f"{self._next_sequence:09d}.{item.kind}"
        write_durably(path, item.to_bytes())
        self._next_sequence += 1
        return path

    def pending(self) -> list[Path]:
        """The files of all unconfirmed items, oldest first."""
        return sorted(path for path in self.directory.iterdir() if _ITEM_NAME.match(path.name))

    def read(self, path: Path) -> SpoolItem:
        """The item in a file that `pending` listed."""
        return SpoolItem.from_bytes(path.suffix[1:], path.read_bytes())  # type: ignore[arg-type]

    def replace(self, path: Path, item: SpoolItem | None) -> None:
        """Puts another item in a pending one's place, or removes it."""
        if item is None:
            path.unlink()
        else:
            write_durably(path, item.to_bytes())

    def reject(self, path: Path) -> Path:
        """Moves an item that MLflow will never take out of the way, into ``rejected/``."""
        self.rejected_directory.mkdir(exist_ok=True)
        target = self.rejected_directory / path.name
        while target.exists():  # sequence numbers start again once the queue is empty
            target = target.with_name(f"again-{target.name}")
        return path.rename(target)

    def acquire(self) -> None:
        """Claims the spool for this process, so that two never publish the same items; and tidies up after a crash.

        Raises:
            UserInputError: If a live process holds it.
        """
        lock_file = (self.directory / "lock").open("w")
        if fcntl is not None:
            try:
                fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock_file.close()
                raise UserInputError(
                    f"{self.directory.parent} belongs to a run that another process is still writing: "
                    "wait for it to end, or stop it"
                ) from None
        self._lock_file = lock_file
        for leftover in self.directory.glob("*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def release(self) -> None:
        """Gives the claim back; does nothing if there is none."""
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file so that after a crash it is either whole or as it was before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Makes a rename durable; needless, and impossible, on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sequence(path: Path) -> int:
    match = _ITEM_NAME.match(path.name)
    assert match is not None
    return int(match[1])
