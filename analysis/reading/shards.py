"""The files of one run's telemetry folder: its manifest, and its Parquet shards with their columns as arrays.

A run of days leaves thousands of shards, since the writer puts on disk every few seconds what it has. So shards are
read in groups, by Arrow's own threads, and each group is reduced as a whole.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from lightning_modules.tracking.records import RunManifest

_GROUP_BYTES = 6 * 2**20
"""On disk; in memory a few times as much, for the group that is reduced and the one that is read meanwhile."""
# Reading ahead pays over a network; on a disk it takes a third of the time.
_FORMAT = ds.ParquetFileFormat(default_fragment_scan_options=ds.ParquetFragmentScanOptions(pre_buffer=False))

Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One Parquet file, and which of its rows count.

    Attributes:
        path: The file, in a folder named as the table.
        last_step: The last step of it that no later attempt has measured again; None: all count.
        rows: In the file, counting or not.
        size: Of the file, in bytes.
    """

    path: Path
    last_step: int | None
    rows: int
    size: int

    def read(self) -> pa.Table:
        """The rows that count.

        Raises:
            UserInputError: If the file is damaged.
        """
        return _read([self], None)


def reduce_shards(
    shards: Sequence[Shard], columns: Sequence[str], reduce: Callable[[Path, pa.Table], Found]
) -> Iterator[Found]:
    """Reads shards group by group and yields, in their order, what is made of the rows of each group that count.

    Args:
        shards: Of one table.
        columns: To read besides ``step``; null where a shard is older than the column.
        reduce: Called with the path of a shard, to be named in messages, and the rows of its group; there is at least
            one. Where it fails for a group, it is called again shard by shard, so that the message names the right one.

    Raises:
        UserInputError: If a shard is damaged, or from ``reduce``.
    """
    wanted = list(dict.fromkeys(("step", *columns)))
    groups = _groups(shards)
    for group, table in _read_ahead(groups, wanted):
        if table.num_rows:
            try:
                found = reduce(group[0].path, table)
            except UserInputError:
                for shard in group:
                    reduce(shard.path, _read([shard], wanted))
                raise
            yield found


def _read_ahead(groups: Sequence[list[Shard]], wanted: Sequence[str]) -> Iterator[tuple[list[Shard], pa.Table]]:
    """Groups with their rows, each read while the one before it is at work."""
    if len(groups) < 2:
        yield from ((group, _read(group, wanted)) for group in groups)
        return
    with ThreadPoolExecutor(1) as reader:
        waiting = deque([reader.submit(_read, groups[0], wanted)])
        for place, group in enumerate(groups):
            waiting.extend(reader.submit(_read, ahead, wanted) for ahead in groups[place + 1 : place + 2])
            yield group, waiting.popleft().result()


def _groups(shards: Sequence[Shard]) -> list[list[Shard]]:
    """Consecutive shards of which the same steps count, up to some bytes together, at least one each."""
    groups: list[list[Shard]] = []
    for _, alike in itertools.groupby(shards, key=lambda shard: shard.last_step):
        size = _GROUP_BYTES
        for shard in alike:
            if size + shard.size > _GROUP_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(shard)
            size += shard.size
    return groups


def _read(group: Sequence[Shard], columns: Sequence[str] | None) -> pa.Table:
    """The rows of a group that count, in order."""
    schema = records.TABLES[group[0].path.parent.name]
    paths = [str(shard.path) for shard in group]
    last = group[0].last_step
    try:
        data = ds.FileSystemDataset.from_paths(paths, schema, format=_FORMAT, filesystem=LocalFileSystem())
        return data.to_table(columns, filter=None if last is None else pc.field("step") <= last)
    except (pa.ArrowException, OSError) as error:
        for shard in group if len(group) > 1 else ():
            _read([shard], columns)
        raise UserInputError(f"cannot read telemetry shard {group[0].path}: {error}") from error


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
    found: list[tuple[str, Path, int, int, int]] = []
    resumed_from: dict[int, int] = {}
    for table in records.TABLES:
        for path in sorted((folder / table).glob("*.parquet")):
            try:
                footer = pq.read_metadata(path)
                size = path.stat().st_size
            except (pa.ArrowException, OSError) as error:
                raise UserInputError(f"cannot read telemetry shard {path}: {error}") from error
            metadata = footer.metadata or {}
            version = int(metadata.get(records.META_SCHEMA_VERSION, records.SCHEMA_VERSION))
            if version != records.SCHEMA_VERSION:
                raise UserInputError(f"{path} has schema version {version}, expected {records.SCHEMA_VERSION}")
            attempt = int(metadata.get(records.META_ATTEMPT, 1))
            if records.META_RESUMED_FROM in metadata:
                resumed_from[attempt] = int(metadata[records.META_RESUMED_FROM])
            found.append((table, path, attempt, footer.num_rows, size))
    shards: dict[str, list[Shard]] = {table: [] for table in records.TABLES}
    for table, path, attempt, rows, size in sorted(found, key=lambda item: item[2]):
        # Later attempts of *any* table count: all tables must tell the story of the same weights.
        superseded = [step for later, step in resumed_from.items() if later > attempt]
        shards[table].append(Shard(path, min(superseded, default=None), rows, size))
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
