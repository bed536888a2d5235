"""Rows handed over by a probe -> Arrow -> one immutable Parquet shard, in the schema of `records`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_modules.tracking import records

Column = Sequence[Any] | np.ndarray | int | str


def record_batch(table: str, columns: Mapping[str, Column]) -> pa.RecordBatch:
    """Rows of one table as Arrow, checked against the schema and sharing no memory with the caller.

    Args:
        table: A name in `records.TABLES`.
        columns: Every column of that table: sequences of equal length n, or a single int or str that holds for all
            rows. A list column takes n sequences or an array ``(n, length)``.

    Raises:
        ValueError: If table, columns, lengths or types do not fit the schema.
    """
    if table not in records.TABLES:
        raise ValueError(f"unknown telemetry table {table!r}: it must be one of {sorted(records.TABLES)}")
    schema = records.TABLES[table]
    if set(columns) != set(schema.names):
        missing, unknown = sorted(set(schema.names) - set(columns)), sorted(set(columns) - set(schema.names))
        raise ValueError(f"columns of table {table!r} do not fit records.TABLES: missing {missing}, unknown {unknown}")
    lengths = {name: len(value) for name, value in columns.items() if not isinstance(value, int | str | np.integer)}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"columns of table {table!r} must have one length (at least one not a scalar), got {lengths}")
    rows = next(iter(lengths.values()))
    arrays = []
    for field in schema:
        try:
            arrays.append(_array(columns[field.name], field.type, rows))
        except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, OverflowError) as error:
            raise ValueError(f"column {field.name!r} of table {table!r} does not hold {field.type}: {error}") from error
    return pa.record_batch(arrays, schema=schema)


def _array(value: Column, kind: pa.DataType, rows: int) -> pa.Array:
    if pa.types.is_dictionary(kind):
        if isinstance(value, str):
            return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))
        return pa.array(value, type=pa.string()).dictionary_encode()
    if isinstance(value, int | np.integer):
        return pa.array(np.full(rows, value), type=kind)
    if isinstance(value, np.ndarray):
        # Arrow wraps matching arrays without copying; probes reuse their buffers.
        value = value.copy()
    if pa.types.is_list(kind) and isinstance(value, np.ndarray) and value.ndim == 2:
        offsets = np.arange(0, value.size + 1, max(value.shape[1], 1), dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, pa.array(value.ravel(), type=kind.value_type))
    return pa.array(value, type=kind, from_pandas=False)


def shard_bytes(table: str, batches: Sequence[pa.RecordBatch], attempt: int, resumed_from: int | None) -> bytes:
    """A Parquet file of the batches, with the metadata that `records` asks of every shard.

    ``resumed_from`` is None where the attempt's own shards say it: in what is measured of a checkpoint later.
    """
    metadata = {
        records.META_ATTEMPT: str(attempt),
        records.META_SCHEMA_VERSION: str(records.SCHEMA_VERSION),
    }
    if resumed_from is not None:
        metadata[records.META_RESUMED_FROM] = str(resumed_from)
    return _parquet(pa.Table.from_batches(batches, schema=records.TABLES[table].with_metadata(metadata)))


def rows_up_to(shard: bytes, step: int) -> bytes | None:
    """The shard without its rows beyond a step; None if nothing remains."""
    table = pq.read_table(pa.BufferReader(shard))
    kept = table.filter(pc.less_equal(table["step"], step))
    if kept.num_rows == table.num_rows:
        return shard
    return _parquet(kept) if kept.num_rows else None


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
