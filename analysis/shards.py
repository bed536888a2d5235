"""The files of one run's telemetry folder: its manifest, and its Parquet shards with their columns as arrays.

A run of days leaves thousands of shards: the writer puts on disk every few seconds what it has. So a shard is opened
with as little ceremony as Parquet allows, and read by threads, which Parquet's decoding lets run side by side.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from lightning_modules.tracking.records import RunManifest

_READERS = 2
_AHEAD = 8
"""Shards that are read before they are asked for: some megabytes each."""

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One Parquet file, and which of its rows count.

    Attributes:
        path: The file.
        last_step: The last step of it that no later attempt has measured again; None: all count.
        rows: In the file, counting or not.
    """

    path: Path
    last_step: int | None
    rows: int

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows that count.

        Args:
            columns: Those wanted, all by default. Columns that the file lacks are left out.

        Raises:
            UserInputError: If the file is damaged.
        """
        wanted = None if columns is None else list(dict.fromkeys((*columns, "step")))
        try:
            with pq.ParquetFile(self.path) as file:
                table = file.read(wanted, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserInputError(f"cannot read telemetry shard {self.path}: {error}") from error
        return table if self.last_step is None else table.filter(pc.field("step") <= self.last_step)


def reduce_shards(
    shards: Sequence[Shard], columns: Sequence[str], reduce: Callable[[Shard, pa.Table], Found]
) -> Iterator[Found]:
    """Reads shards side by side and yields what is made of each, in their order; few are in memory at a time.

    Args:
        shards: Those without a row that counts are passed over.
        columns: See `Shard.read`.
        reduce: Called in a thread with a shard and its rows.

    Raises:
        UserInputError: If a shard is damaged.
    """

    def reduced(shard: Shard) -> Found | None:
        table = shard.read(columns)
        return reduce(shard, table) if table.num_rows else None

    with ThreadPoolExecutor(_READERS) as readers:
        waiting: deque[Future[Found | None]] = deque()
        for place, shard in enumerate(shards):
            waiting.append(readers.submit(reduced, shard))
            while waiting and (len(waiting) > _AHEAD or place == len(shards) - 1):
                if (found := waiting.popleft().result()) is not None:
                    yield found


def read_manifest(folder: Path) -> RunManifest:
    """The run's manifest.

    Raises:
        UserInputError: If it is missing or unreadable.
    """
    path = folder / Path(records.MANIFEST_PATH).name
    if not path.is_file():
        raise UserInputError(f"no {path.name} in {folder}: the run has not committed any telemetry")
    try:
        return RunManifest.from_json(path.read_text())
    except (ValueError, TypeError) as error:
        raise UserInputError(f"{path}: {error}") from error


def list_shards(folder: Path) -> dict[str, list[Shard]]:
    """Every shard by table, in order of attempt and name, with the rows that a resumed run superseded cut off.

    Raises:
        UserInputError: If a shard cannot be opened, or has another schema version.
    """
    found: list[tuple[str, Path, int, int]] = []
    resumed_from: dict[int, int] = {}
    for table in records.TABLES:
        for path in sorted((folder / table).glob("*.parquet")):
            try:
                footer = pq.read_metadata(path)
            except (pa.ArrowException, OSError) as error:
                raise UserInputError(f"cannot read telemetry shard {path}: {error}") from error
            metadata = footer.metadata or {}
            version = int(metadata.get(records.META_SCHEMA_VERSION, records.SCHEMA_VERSION))
            if version != records.SCHEMA_VERSION:
                raise UserInputError(f"{path} has schema version {version}, expected {records.SCHEMA_VERSION}")
            attempt = int(metadata.get(records.META_ATTEMPT, 1))
            if records.META_RESUMED_FROM in metadata:
                resumed_from[attempt] = int(metadata[records.META_RESUMED_FROM])
            found.append((table, path, attempt, footer.num_rows))
    shards: dict[str, list[Shard]] = {table: [] for table in records.TABLES}
    for table, path, attempt, rows in sorted(found, key=lambda item: item[2]):
        # Later attempts of *any* table count: all tables must tell the story of the same weights.
        superseded = [step for later, step in resumed_from.items() if later > attempt]
        shards[table].append(Shard(path, min(superseded, default=None), rows))
    return shards


def distinct(steps: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The distinct steps, increasing, and the place of each row's among them; quick where equal ones are adjacent."""
    first = np.r_[True, steps[1:] != steps[:-1]]
    found, place = np.unique(steps[first], return_inverse=True)
    return found, place[np.cumsum(first) - 1]


def codes(column: pa.ChunkedArray, names: Sequence[str], path: Path) -> npt.NDArray[np.int64]:
    """Index in ``names`` of each entry of a dictionary-encoded text column."""
    encoded = _one_array(column)
    if not isinstance(encoded, pa.DictionaryArray):
        encoded = encoded.dictionary_encode()
    words = encoded.dictionary.to_pylist()
    place = {name: at for at, name in enumerate(names)}
    unknown = set(words) - set(names)
    if unknown:
        raise UserInputError(f"{path}: unknown value {sorted(unknown)}, expected one of {list(names)}")
    lookup = np.array([place[word] for word in words], dtype=np.int64)
    return lookup[encoded.indices.to_numpy(zero_copy_only=False)] if len(encoded) else lookup[:0]


def stack_lists(table: pa.Table, name: str, path: Path, width: int) -> npt.NDArray:
    """A list column whose lists all have ``width`` entries, as an array (rows, width)."""
    values, widths = list_entries(table, name)
    if (widths != width).any():
        raise UserInputError(f"{path}: column {name!r} must hold lists of {width} entries in every row")
    return values.reshape(len(widths), width)


def list_entries(table: pa.Table, name: str) -> tuple[npt.NDArray, npt.NDArray[np.int64]]:
    """All entries of a list column, one list after the other, and the length of each list."""
    lists = _one_array(table[name])
    return lists.flatten().to_numpy(zero_copy_only=False), np.diff(lists.offsets.to_numpy()).astype(np.int64)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    joined = column.unify_dictionaries().combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined
