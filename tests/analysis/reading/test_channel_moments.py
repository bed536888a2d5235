"""Moments of channels: where they land, when they are read, and blocks of unequal width."""

import dataclasses
import pickle
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from analysis.reading import shards
from analysis.reading.channel_moments import DEFERRED_MOMENTS, read_activations
from analysis.reading.telemetry import read_telemetry
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from tests.analysis import synthetic
from tests.analysis.synthetic import K

TABLE = records.CHANNEL_ACTIVATION
WIDTHS = {"down": 4, "up": 6}


@pytest.fixture
def folder(tmp_path):
    synthetic.write_telemetry(tmp_path / "telemetry", "dtr", 0)
    return tmp_path / "telemetry"


@pytest.mark.parametrize("moment", [*DEFERRED_MOMENTS, "mean_square", "count"])
def test_every_row_is_in_its_cell(folder, moment):
    run = read_telemetry(folder)
    for path in (folder / TABLE).glob("*"):
        for row in pq.read_table(path).to_pylist():
            cell = run[f"activation_{moment}"].sel({"activation_step": row["step"], "block": row["block"]})
            np.testing.assert_array_equal(cell.sel(site=row["site"], task=row["task"]), np.float32(row[moment]))


def test_other_moments_stay_on_disk_until_they_are_looked_at(folder):
    whole, run, late = (read_telemetry(folder) for _ in range(3))
    whole.load()
    copy = pickle.loads(pickle.dumps(run))
    assert run["activation_mean"].shape == whole["activation_mean"].shape
    part = run["activation_active_fraction"].sel(site="input", block=["blocks.1"]).isel(activation_step=[3, 1])
    expected = whole["activation_active_fraction"].sel(site="input", block=["blocks.1"]).isel(activation_step=[3, 1])
    assert part.equals(expected)
    shutil.rmtree(folder)
    assert run["activation_active_fraction"].equals(whole["activation_active_fraction"])  # read as a whole, and kept
    assert late["activation_mean_square"].equals(whole["activation_mean_square"])
    for gone in (late["activation_mean"], copy["activation_mean"]):
        with pytest.raises(UserInputError, match="cannot read telemetry shard"):
            gone.load()


def unet(folder, steps=(10, 20), update_widths=None, left_out=()):
    """Writes a run whose blocks add other numbers of channels than they read; returns its rows."""
    rows = []
    for step in steps:
        for block, width in WIDTHS.items():
            for site, channels in (("input", width), ("update", (update_widths or {"down": 6, "up": 4})[block])):
                for task in range(K):
                    values = 1000.0 * step + 100 * len(block) + 10 * task + np.arange(channels) / 10
                    rows.append((step, block, site, task, 5, values, 2 * values, 0 * values))
    rows = [row for place, row in enumerate(rows) if place not in left_out]
    names = [field.name for field in records.TABLES[TABLE]]
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    synthetic.Shards(folder).write(TABLE, "part", columns)
    return rows


def read_unet(folder):
    manifest = dataclasses.replace(synthetic.manifest(), block_channels=WIDTHS)
    return read_activations(shards.list_shards(folder)[TABLE], manifest)


def test_blocks_of_unequal_width_are_filled_up(tmp_path):
    rows = unet(tmp_path, left_out=(3, 40))
    found = read_unet(tmp_path)
    assert found.sizes["channel"] == 6
    for step, block, site, task, _, mean, mean_square, _ in rows:
        cell = found.sel(activation_step=step, block=block, site=site, task=task)
        for moment, values in (("mean", mean), ("mean_square", mean_square)):
            padded = np.pad(np.float32(values), (0, 6 - len(values)), constant_values=np.nan)
            np.testing.assert_array_equal(cell[f"activation_{moment}"], padded)
    assert (found["activation_count"] == 0).sum() == 2
    assert found["activation_mean_square"].isnull().all("channel").sum() == 2


def test_lists_of_a_wrong_length_are_refused(tmp_path):
    unet(tmp_path, update_widths={"down": 7, "up": 4})
    with pytest.raises(UserInputError, match=r"part.parquet: column 'mean_square' .*, not 7"):
        read_unet(tmp_path)
    row = pq.read_table(tmp_path / TABLE / "part.parquet").slice(0, 1).to_pydict()
    synthetic.Shards(tmp_path).write(TABLE, "part", row | {"mean_square": [[1.0]]})
    with pytest.raises(UserInputError, match="lists of 4 entries for a block that reads as many channels, not 1"):
        read_unet(tmp_path)
