"""Tests for ``lightning_modules/tracking/shards.py``."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from lightning_modules.tracking import records
from lightning_modules.tracking.shards import record_batch, rows_up_to, shard_bytes


def losses(steps):
    n = len(steps)
    return {
        "step": np.asarray(steps),
        "window_start": 0,
        "split": "train",
        "quantity": ["mse"] * n,
        "timestep": range(n),
        "count": np.ones(n, dtype=np.int32),
        "sum": np.linspace(0, 1, n, dtype=np.float32),
        "sum_sq": [float("nan")] * n,
    }


def gramians(n, groups):
    return {
        "step": 7,
        "layer": [f"blocks.{i}" for i in range(n)],
        "halves": 2,
        "group_count": np.full((n, groups), 3),
        "group_loss": [np.arange(groups, dtype=np.float64)] * n,
        "gramian": np.arange(n * groups * groups, dtype=np.float64).reshape(n, groups * groups),
        "coverage": np.ones(n),
    }


def test_round_trip_through_parquet():
    batches = [record_batch(records.GRADIENT_GRAMIAN, gramians(n, 4)) for n in (2, 3)]
    content = shard_bytes(records.GRADIENT_GRAMIAN, batches, attempt=3, resumed_from=40)
    table = pq.read_table(io.BytesIO(content))
    assert table.schema.equals(records.TABLES[records.GRADIENT_GRAMIAN])
    assert table.schema.metadata[records.META_ATTEMPT] == b"3"
    assert table.schema.metadata[records.META_RESUMED_FROM] == b"40"
    assert table.schema.metadata[records.META_SCHEMA_VERSION] == str(records.SCHEMA_VERSION).encode()
    assert table["layer"].to_pylist() == ["blocks.0", "blocks.1", "blocks.0", "blocks.1", "blocks.2"]
    expected = np.concatenate([np.arange(32.0).reshape(2, 16), np.arange(48.0).reshape(3, 16)])
    np.testing.assert_array_equal(np.array(table["gramian"].to_pylist()), expected)
    assert table["group_count"].to_pylist() == [[3] * 4] * 5


def test_rows_share_no_memory_with_the_caller():
    columns = losses([1, 2, 3])
    columns["sum"] = np.ones(3)  # float64 as in the schema: Arrow would wrap it without copying
    batch = record_batch(records.TIMESTEP_LOSS, columns)
    columns["sum"][:] = 0
    columns["step"][:] = 0
    assert batch["sum"].to_pylist() == [1.0, 1.0, 1.0]
    assert batch["step"].to_pylist() == [1, 2, 3]


def test_rows_up_to_a_step():
    content = shard_bytes(records.TIMESTEP_LOSS, [record_batch(records.TIMESTEP_LOSS, losses([1, 5, 9]))], 1, 0)
    assert rows_up_to(content, 9) is content
    assert rows_up_to(content, 0) is None
    kept = pq.read_table(io.BytesIO(rows_up_to(content, 5)))
    assert kept["step"].to_pylist() == [1, 5]
    assert kept.schema.metadata[records.META_ATTEMPT] == b"1"


def changed(**columns):
    return losses([1, 2]) | columns


@pytest.mark.parametrize(
    ("table", "columns", "culprit"),
    [
        ("timestep_los", losses([1]), "timestep_los"),
        (records.TIMESTEP_LOSS, {"step": [1]}, "missing.*sum_sq"),
        (records.TIMESTEP_LOSS, changed(extra=[1, 2]), "extra"),
        (records.TIMESTEP_LOSS, changed(sum=[1.0]), "length"),
        (records.TIMESTEP_LOSS, changed(sum=["a", "b"]), "'sum'"),
        (records.TIMESTEP_LOSS, changed(count=np.array([0.5, 1.0])), "'count'"),
        (records.GRADIENT_GRAMIAN, gramians(2, 2) | {"halves": [1, 1000]}, "'halves'"),
    ],
)
def test_what_does_not_fit_the_schema_is_named(table, columns, culprit):
    with pytest.raises(ValueError, match=culprit):
        record_batch(table, columns)


def test_scalars_alone_do_not_say_how_many_rows():
    columns = dict.fromkeys(records.TABLES[records.TIMESTEP_LOSS].names, 1)
    with pytest.raises(ValueError, match="length"):
        record_batch(records.TIMESTEP_LOSS, columns)
