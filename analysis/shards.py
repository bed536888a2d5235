"""The files of one run's telemetry folder: its manifest, and its Parquet shards with their columns as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from lightning_modules.tracking.records import RunManifest


@dataclasses.dataclass(frozen=True)
class Shard:
    """One Parquet file, and the last step of it that no later attempt has measured again (None: all count)."""

    path: Path
    last_step: int | None

    def read(self) -> pa.Table:
        """The rows that count."""
        table = pq.read_table(self.path)
        return table if self.last_step is None else table.filter(pc.field("step") <= self.last_step)


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
    found: list[tuple[str, Path, int]] = []
    resumed_from: dict[int, int] = {}
    for table in records.TABLES:
        for path in sorted((folder / table).glob("*.parquet")):
            try:
                metadata = pq.read_schema(path).metadata or {}
            except (pa.ArrowInvalid, OSError) as error:
                raise UserInputError(f"cannot read telemetry shard {path}: {error}") from error
            version = int(metadata.get(records.META_SCHEMA_VERSION, records.SCHEMA_VERSION))
            if version != records.SCHEMA_VERSION:
                raise UserInputError(f"{path} has schema version {version}, expected {records.SCHEMA_VERSION}")
            attempt = int(metadata.get(records.META_ATTEMPT, 1))
            if records.META_RESUMED_FROM in metadata:
                resumed_from[attempt] = int(metadata[records.META_RESUMED_FROM])
            found.append((table, path, attempt))
    shards: dict[str, list[Shard]] = {table: [] for table in records.TABLES}
    for table, path, attempt in sorted(found, key=lambda item: item[2]):
        # Later attempts of *any* table count: all tables must tell the story of the same weights.
        superseded = [step for later, step in resumed_from.items() if later > attempt]
        shards[table].append(Shard(path, min(superseded) if superseded else None))
    return shards


def codes(column: pa.ChunkedArray, names: Sequence[str], path: Path) -> npt.NDArray[np.int64]:
    """Index in ``names`` of each entry of a dictionary-encoded text column."""
    encoded = column.combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = pa.concat_arrays(encoded.unify_dictionaries().chunks)
    if not isinstance(encoded, pa.DictionaryArray):
        encoded = encoded.dictionary_encode()
    words = encoded.dictionary.to_pylist()
    unknown = set(words) - set(names)
    if unknown:
        raise UserInputError(f"{path}: unknown value {sorted(unknown)}, expected one of {list(names)}")
    lookup = np.array([names.index(word) for word in words], dtype=np.int64)
    return lookup[encoded.indices.to_numpy(zero_copy_only=False)] if len(encoded) else lookup[:0]


def stack_lists(table: pa.Table, name: str, path: Path, width: int) -> npt.NDArray:
    """A list column whose lists all have ``width`` entries, as an array (rows, width)."""
    lists = table[name].combine_chunks()
    lists = pa.concat_arrays(lists.chunks) if isinstance(lists, pa.ChunkedArray) else lists
    values = lists.flatten().to_numpy(zero_copy_only=False)
    if values.size != len(lists) * width:
        raise UserInputError(f"{path}: column {name!r} must hold lists of {width} entries in every row")
    return values.reshape(len(lists), width)
