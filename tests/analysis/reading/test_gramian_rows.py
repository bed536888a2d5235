"""Rows of probes and layers in any order land in their cells."""

import numpy as np
import pytest

from analysis.reading import shards
from analysis.reading.gramian_rows import read_gramians
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from tests.analysis import synthetic
from tests.analysis.synthetic import HALVES, LAYERS, K

TABLE = records.GRADIENT_GRAMIAN
G = K * HALVES


def rows_of(steps, seed=0):
    rng = np.random.default_rng(seed)
    parts = [synthetic.gramian_columns(rng, step) for step in steps]
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def chosen(columns, places):
    return {name: [values[place] for place in places] for name, values in columns.items()}


def read(folder):
    return read_gramians(shards.list_shards(folder)[TABLE], synthetic.manifest())


@pytest.mark.parametrize("group_size", [1, 2**23])
def test_rows_in_any_order_and_missing_ones(tmp_path, group_size, monkeypatch):
    monkeypatch.setattr(shards, "_GROUP_BYTES", group_size)
    columns = rows_of([10, 20, 30])
    columns["group_count"] = [[step + group for group in range(G)] for step in columns["step"]]
    columns["coverage"] = [step / 100 for step in columns["step"]]
    order = np.random.default_rng(1).permutation(3 * len(LAYERS))
    order = order[order != 7]  # step 20 lacks a layer
    for part, places in enumerate(np.array_split(order, 4)):
        synthetic.Shards(tmp_path).write(TABLE, f"part-{part}", chosen(columns, places))
    found = read(tmp_path)
    assert found["gradient_step"].values.tolist() == [10, 20, 30]
    assert sorted(found["layer"].values) == sorted(LAYERS)
    for place in order:
        cell = found["gramian"].sel(gradient_step=columns["step"][place], layer=columns["layer"][place])
        np.testing.assert_array_equal(cell.values.reshape(-1), np.float32(columns["gramian"][place]))
    assert found["gramian"].sel(gradient_step=20, layer=columns["layer"][7]).isnull().all()
    assert int(found["gramian"].isnull().sum()) == G * G
    np.testing.assert_array_equal(found["group_count"].sel(gradient_step=20).values.reshape(-1), 20 + np.arange(G))
    assert found["coverage"].values.tolist() == [0.1, 0.2, 0.3]


def test_single_precision_is_kept(tmp_path):
    synthetic.Shards(tmp_path).write(TABLE, "part", rows_of([10]))
    assert read(tmp_path)["gramian"].dtype == np.float32


@pytest.mark.parametrize("together", [True, False])
def test_different_numbers_of_halves_are_refused(tmp_path, together):
    two, one = rows_of([10]), rows_of([20])
    one["halves"] = [1] * len(LAYERS)
    for name, width in (("group_count", K), ("group_loss", K), ("gramian", K * K)):
        one[name] = [list(values)[:width] for values in one[name]]
    writer = synthetic.Shards(tmp_path)
    if together:
        writer.write(TABLE, "both", {name: two[name] + one[name] for name in two})
    else:
        writer.write(TABLE, "one", two)
        writer.write(TABLE, "two", one)
    with pytest.raises(UserInputError, match=rf"{TABLE}: Gramians with different numbers of halves \[1, 2\]"):
        read(tmp_path)


def test_a_gramian_of_another_size_is_refused(tmp_path):
    columns = rows_of([10, 20])
    columns["gramian"][8] = columns["gramian"][8][:-1]
    synthetic.Shards(tmp_path).write(TABLE, "part", columns)
    with pytest.raises(UserInputError, match=rf"part.parquet: column 'gramian' must hold lists of {G * G} entries"):
        read(tmp_path)
