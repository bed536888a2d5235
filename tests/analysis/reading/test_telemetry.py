import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.reading.telemetry import read_telemetry
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from tests.analysis import synthetic


@pytest.fixture
def folder(tmp_path):
    synthetic.write_telemetry(tmp_path / "telemetry", "dtr", 0)
    return tmp_path / "telemetry"


def test_loss_moments_equal_sums_over_the_rows(folder):
    run = read_telemetry(folder)
    shards = sorted((folder / records.TIMESTEP_LOSS).glob("*.parquet"))
    rows = pq.ParquetDataset(shards).read().to_pandas()
    for split in ("train", "val"):
        for step in (100, 1000):
            for task in (0, 5):
                low, high = int(run.t_low[task]), int(run.t_high[task])
                mine = rows[(rows.split == split) & (rows.step == step) & rows.timestep.between(low, high)]
                got = run[f"{split}_loss"].sel(quantity="mse", task=task).sel({f"{split}_step": step})
                np.testing.assert_allclose(got, [mine["count"].sum(), mine["sum"].sum(), mine.sum_sq.sum()])
        quarter = run[f"{split}_quarter_loss"].sel(quantity="mse", quarter=3, moment="sum").isel({f"{split}_step": 2})
        mine = rows[(rows.split == split) & (rows.step == 300) & (rows.timestep >= 150)]
        np.testing.assert_allclose(quarter.sum("task"), mine["sum"].sum())
        assert (quarter > 0).values.tolist() == [False] * 6 + [True] * 2
    pooled = run.train_timestep_loss.sel(quantity="mse", moment="sum")
    np.testing.assert_allclose(pooled, rows[rows.split == "train"].groupby("timestep")["sum"].sum())
    last = run.val_timestep_loss.sel(quantity="mse", moment="sum")
    np.testing.assert_allclose(last, 2 * synthetic.val_loss("dtr", 0, 1000.0))
    assert run.train_loss.sel(quantity="vb", moment="count").sum() == 0


def test_gramian_activation_and_mask_land_in_their_cells(folder):
    run = read_telemetry(folder)
    row = pq.read_table(folder / records.GRADIENT_GRAMIAN / "part-00001.parquet").to_pylist()[7]
    got = run.gramian.sel(gradient_step=row["step"], layer=row["layer"])
    groups = synthetic.K * synthetic.HALVES
    np.testing.assert_array_equal(got.values.reshape(groups, groups), np.reshape(row["gramian"], (groups, groups)))
    assert list(run.layer.values) == list(synthetic.LAYERS)
    row = pq.read_table(folder / records.CHANNEL_ACTIVATION / "part-00000.parquet").to_pylist()[11]
    cell = run.sel(activation_step=row["step"], block=row["block"], site=row["site"], task=row["task"])
    np.testing.assert_array_equal(cell.activation_mean_square, np.float32(row["mean_square"]))
    assert cell.activation_count == row["count"]
    np.testing.assert_array_equal(run["mask"].sel(block="blocks.1"), synthetic.dtr_mask("dtr", 0, 32))


def test_coverage_is_read_and_shards_may_lack_it_or_hold_more(folder):
    paths = sorted((folder / records.GRADIENT_GRAMIAN).glob("*.parquet"))
    old, new = (pq.read_table(path) for path in paths)
    pq.write_table(old.drop_columns("coverage"), paths[0])
    place = new.schema.get_field_index("coverage")
    new = new.set_column(place, "coverage", pa.array([0.75] * len(new))).append_column(
        "more", pa.array(range(len(new)))
    )
    pq.write_table(new, paths[1])
    run = read_telemetry(folder)
    assert run.coverage.dims == ("gradient_step",)
    assert run.coverage.values.tolist() == [1.0] * 5 + [0.75] * 5
    assert run.gramian.notnull().all()


def test_coordinates_name_the_intervals(folder):
    run = read_telemetry(folder)
    assert list(run.interval.values[:2]) == ["t000-024", "t025-049"]
    assert (run.t_low.values[1], run.t_high.values[1]) == (25, 49)
    np.testing.assert_allclose(run.log_snr[1], np.median(np.linspace(8, -8, 200)[25:50]))
    np.testing.assert_array_equal(run.other_log_snr, run.log_snr)


def test_infinite_log_snr_at_the_last_timestep_does_not_spread(tmp_path):
    synthetic.write_telemetry(tmp_path, "baseline", 0)
    manifest = synthetic.manifest()
    manifest.log_snr[-1] = -np.inf
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert np.isfinite(read_telemetry(tmp_path).log_snr).all()


def test_resumed_run_drops_what_it_measured_again(folder):
    """Killed at 1000 and resumed from 600: steps 700 to 1000 of attempt 1 give way, in every table."""
    later = synthetic.Shards(folder, attempt=2, resumed_from=600)
    columns = synthetic.loss_columns("val", "baseline", 1, 700, 601)
    later.write(records.TIMESTEP_LOSS, "part-00002", columns)
    run = read_telemetry(folder)
    assert list(run.val_step.values) == [100, 200, 300, 400, 500, 600, 700]
    got = run.val_loss.sel(val_step=700, quantity="mse", moment="sum").sum()
    np.testing.assert_allclose(got, np.sum(columns["sum"]))
    # Attempt 2 has not probed gradients yet; attempt 1's later probes belong to weights that no longer exist.
    assert int(run.gradient_step[-1]) == 600


def test_a_run_without_gradient_probes_still_loads(tmp_path):
    (tmp_path / "manifest.json").write_text(synthetic.manifest().to_json())
    synthetic.Shards(tmp_path).write(
        records.TIMESTEP_LOSS, "part-00000", synthetic.loss_columns("val", "baseline", 0, 100, 1)
    )
    run = read_telemetry(tmp_path)
    assert "val_loss" in run
    assert "gramian" not in run


def test_task_weights_are_read_in_order(folder):
    shards = synthetic.Shards(folder)
    weights = np.random.default_rng(0).uniform(0.5, 2, (4, synthetic.K))
    for part, rows in enumerate(([2, 3], [0, 1])):
        columns = {
            "step": [100 * (row + 1) for row in rows],
            "window_start": [100 * row for row in rows],
            "weight": [weights[row].tolist() for row in rows],
        }
        shards.write(records.TASK_WEIGHT, f"part-{part:05d}", columns)
    run = read_telemetry(folder)
    assert run["task_weight"].dims == ("weight_step", "task")
    assert run["weight_step"].values.tolist() == [100, 200, 300, 400]
    np.testing.assert_allclose(run["task_weight"], weights)
    assert run["task_weight"]["interval"].values[0] == "t000-024"
    shards.write(records.TASK_WEIGHT, "part-00002", {"step": [500], "window_start": [400], "weight": [[1.0, 2.0]]})
    with pytest.raises(UserInputError, match=r"damaged|task weights"):
        read_telemetry(folder)


def test_clear_errors(folder, tmp_path):
    with pytest.raises(UserInputError, match="not committed any telemetry"):
        read_telemetry(tmp_path)
    damaged = folder / records.TIMESTEP_LOSS / "part-00009.parquet"
    damaged.write_bytes(b"PAR1 cut off")
    with pytest.raises(UserInputError, match=r"cannot read telemetry shard .*part-00009"):
        read_telemetry(folder)
    damaged.unlink()
    columns = synthetic.loss_columns("val", "dtr", 0, 100, 1) | {"split": ["test"] * synthetic.T}
    synthetic.Shards(folder).write(records.TIMESTEP_LOSS, "part-00003", columns)
    with pytest.raises(UserInputError, match=r"part-00003.*unknown value \['test'\]"):
        read_telemetry(folder)
