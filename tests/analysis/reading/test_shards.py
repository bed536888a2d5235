"""Reading many shards at once gives what reading each would, and names the one that is at fault."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.reading import shards
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from tests.analysis import synthetic

TABLE = records.TIMESTEP_LOSS
GROUP_SIZES = [1, 20_000, 2**23]
"""In bytes: a shard each, a few, all together."""


@pytest.fixture(params=GROUP_SIZES)
def group_size(request, monkeypatch):
    monkeypatch.setattr(shards, "_GROUP_BYTES", request.param)
    return request.param


def write(folder, first, last, *, attempt=1, resumed_from=0, **changes):
    writer = synthetic.Shards(folder, attempt, resumed_from)
    for step in range(first, last + 1, 100):
        columns = synthetic.loss_columns("val", "dtr", attempt, step, step) | changes
        writer.write(TABLE, f"a{attempt:03d}-{step:06d}", columns)
    return sorted((folder / TABLE).glob("*"))


def rows(path, table):
    return table.to_pandas()


def test_groups_of_any_size_hold_all_rows_in_order(tmp_path, group_size):
    write(tmp_path, 100, 1200)
    write(tmp_path, 700, 900, attempt=2, resumed_from=600)
    found = shards.list_shards(tmp_path)[TABLE]
    groups = list(shards.reduce_shards(found, ("timestep", "sum"), rows))
    counting = 9  # shards, of each attempt those that no later one has measured again
    assert (len(groups) == counting) == (group_size == 1)
    assert (len(groups) == 2) == (group_size == 2**23)
    got = np.concatenate([group[["step", "timestep", "sum"]].to_numpy() for group in groups])
    expected = [
        pq.read_table(shard.path, columns=["step", "timestep", "sum"]).to_pandas().query("step <= @last").to_numpy()
        for shard in found
        for last in [shard.last_step or np.inf]
    ]
    np.testing.assert_array_equal(got, np.concatenate(expected))
    assert sorted(set(got[:, 0])) == [100, 200, 300, 400, 500, 600, 700, 800, 900]


def test_few_groups_are_read_before_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_GROUP_BYTES", 1)
    write(tmp_path, 100, 2000)
    read = []
    plain = shards._read
    monkeypatch.setattr(shards, "_read", lambda group, columns: read.append(group) or plain(group, columns))
    groups = shards.reduce_shards(shards.list_shards(tmp_path)[TABLE], ("sum",), rows)
    for number in range(1, 4):
        next(groups)
        assert len(read) <= number + 1
    groups.close()
    assert len(read) <= 5


def test_the_shard_with_an_unknown_word_is_named(tmp_path, group_size):
    paths = write(tmp_path, 100, 600)
    write(tmp_path, 300, 300, split=["test"] * synthetic.T)

    def splits(path, table):
        return shards.codes(table["split"], ("train", "val"), path)

    with pytest.raises(UserInputError, match=rf"{paths[2].name}: unknown value \['test'\]"):
        list(shards.reduce_shards(shards.list_shards(tmp_path)[TABLE], ("split",), splits))


def test_the_damaged_shard_is_named(tmp_path, group_size):
    """Its end, where Parquet keeps what is in it, is whole; some of its rows are not."""
    paths = write(tmp_path, 100, 600)
    content = bytearray(paths[3].read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    paths[3].write_bytes(content)
    found = shards.list_shards(tmp_path)[TABLE]
    with pytest.raises(UserInputError, match=f"cannot read telemetry shard .*{paths[3].name}"):
        list(shards.reduce_shards(found, ("sum", "sum_sq", "split"), rows))
    with pytest.raises(UserInputError, match=f"cannot read telemetry shard .*{paths[3].name}"):
        found[3].read()
    assert found[2].read().num_rows == synthetic.T


def test_a_shard_that_went_away_is_named(tmp_path, group_size):
    paths = write(tmp_path, 100, 300)
    found = shards.list_shards(tmp_path)[TABLE]
    paths[1].unlink()
    with pytest.raises(UserInputError, match=f"cannot read telemetry shard .*{paths[1].name}"):
        list(shards.reduce_shards(found, ("sum",), rows))


def test_a_column_that_a_shard_lacks_is_null(tmp_path):
    paths = write(tmp_path, 100, 300)
    pq.write_table(pq.read_table(paths[1]).drop_columns("sum_sq"), paths[1])
    (group,) = shards.reduce_shards(shards.list_shards(tmp_path)[TABLE], ("sum_sq",), rows)
    assert group.groupby("step")["sum_sq"].count().tolist() == [synthetic.T, 0, synthetic.T]


def test_no_shards_are_no_groups(tmp_path):
    assert list(shards.reduce_shards([], ("sum",), rows)) == []
    write(tmp_path, 700, 800)
    write(tmp_path, 300, 300, attempt=2, resumed_from=200)
    first = shards.list_shards(tmp_path)[TABLE][:2]
    assert [shard.last_step for shard in first] == [200, 200]
    assert list(shards.reduce_shards(first, ("sum",), rows)) == []


def test_another_schema_version_is_refused(tmp_path):
    (path,) = write(tmp_path, 100, 100)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({records.META_SCHEMA_VERSION: "99"}), path)
    with pytest.raises(UserInputError, match=f"{path.name} has schema version 99"):
        shards.list_shards(tmp_path)


@pytest.mark.parametrize("steps", [[5], [3, 3, 1, 1, 3], list(np.random.default_rng(0).integers(0, 9, 200))])
def test_distinct_steps_are_numpys(steps):
    found, place = shards.distinct(np.asarray(steps))
    expected, inverse = np.unique(steps, return_inverse=True)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(place, inverse)


def test_lists_are_stacked_and_uneven_ones_refused(tmp_path):
    table = pa.table({"x": pa.chunked_array([[[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]])})
    assert shards.stack_lists(table, "x", tmp_path, 2).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert shards.stack_lists(table.slice(1), "x", tmp_path, 2).tolist() == [[3, 4], [5, 6]]
    uneven = pa.table({"x": [[1.0], [2.0, 3.0, 4.0]]})  # as many entries as two lists of two have
    with pytest.raises(UserInputError, match=r"column 'x' must hold lists of 2 entries"):
        shards.stack_lists(uneven, "x", tmp_path, 2)
    entries, widths = shards.list_entries(uneven, "x")
    assert (entries.tolist(), widths.tolist()) == ([1, 2, 3, 4], [1, 3])
