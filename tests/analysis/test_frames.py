import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest

from analysis import frames
from analysis.axes import CURVE_COLUMNS
from analysis.reading.telemetry import read_telemetry
from lightning_modules.tracking import records
from tests.analysis import synthetic

BOUNDS = [0, 20, 40, 1000]


def test_curves_follow_the_true_losses(runs):
    curves = frames.curves_frame(runs)
    assert list(curves.columns) == CURVE_COLUMNS
    np.testing.assert_array_equal(curves["samples"], 64 * curves["step"])
    assert curves[["seconds", "flops"]].isna().all(axis=None)  # neither was measured in these runs
    for method, seed, step in (("baseline", 0, 100), ("dtr", 2, 1000)):
        truth = synthetic.val_loss(method, seed, step)
        rows = curves[(curves.method == method) & (curves.seed == seed) & (curves.step == step)]
        value = rows.set_index("metric")["value"]
        assert value["loss/val"] == pytest.approx(truth.mean())
        assert value["loss/train_mse"] == pytest.approx(truth.mean())
        assert value["loss/val_low_noise"] == pytest.approx(truth[:50].mean())
        assert value["loss/val_high_noise"] == pytest.approx(truth[150:].mean())
        assert value["loss/val_t025-049"] == pytest.approx(truth[25:50].mean())
        assert 0 <= value["conflict/rate"] <= 1
    assert curves.groupby(["run", "metric"]).size().eq(len(synthetic.STEPS)).all()


def test_effective_channels_shrink_with_the_mask(runs):
    curves = frames.curves_frame(runs)
    mean = curves[curves.metric == "activation/effective_channels"].groupby("method")["value"].mean()
    assert mean["dtr"] < mean["baseline"] < 32


def test_runs_frame_has_a_row_per_run(runs):
    table = frames.runs_frame(runs)
    assert table["name"].tolist() == [run.attrs["name"] for run in runs]
    assert table["step"].eq(1000).all()
    assert table["parameters"].eq(250_000).all()
    assert table.loc[0, "val_loss"] == pytest.approx(synthetic.val_loss("baseline", 0, 1000).mean())
    assert table["conflict_rate"].between(0.4, 0.75).all()


def test_a_run_without_probes_yields_what_it_has(runs):
    bare = runs[0].drop_vars(["gramian", "group_count", "group_loss", "activation_mean_square"])
    row = frames.runs_frame([bare]).iloc[0]
    assert np.isnan(row.conflict_rate)
    assert "conflict/rate" not in set(frames.curves_frame([bare]).metric)
    assert frames.curves_frame([]).columns.tolist() == CURVE_COLUMNS


def stratified_run(folder, like, skipped=range(0)):
    """A run on `BOUNDS` whose losses were sampled as in training, 60 per task; the run and its table of timesteps.

    No sample falls on the timesteps ``skipped``.
    """
    rng = np.random.default_rng(0)
    tables = []
    for split in ("train", "val"):
        for step in (10, 20):
            drawn = np.concatenate(
                [rng.choice(np.setdiff1d(np.arange(*ends), skipped), 60) for ends in itertools.pairwise(BOUNDS)]
            )
            timestep, count = np.unique(drawn, return_counts=True)
            mean = 2.0 * np.exp(-timestep / 50) + rng.random(len(timestep)) / step
            rows = {"step": step, "window_start": step - 9, "split": split, "quantity": "mse", "timestep": timestep}
            tables.append(pd.DataFrame({**rows, "count": count, "sum": count * mean, "sum_sq": count * mean**2}))
    table = pd.concat(tables, ignore_index=True)
    manifest = dataclasses.replace(
        synthetic.manifest(), num_timesteps=1000, interval_bounds=BOUNDS, log_snr=np.linspace(8, -8, 1000).tolist()
    )
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(manifest.to_json())
    synthetic.Shards(folder).write(records.TIMESTEP_LOSS, "part-00000", table.to_dict("list"))
    run = read_telemetry(folder)
    return run.assign_attrs(like.attrs | run.attrs), table


def uniform_mean(rows, low, high):
    """Mean over uniform t in [low, high): a task's samples there weigh by the timesteps they stand for."""
    total = shared = 0.0
    for task_low, task_high in itertools.pairwise(BOUNDS):
        first, end = max(low, task_low), min(high, task_high)
        mine = rows[(rows.timestep >= first) & (rows.timestep < end)]
        if len(mine):
            total += (end - first) * mine["sum"].sum() / mine["count"].sum()
            shared += end - first
    return total / shared


def test_losses_are_means_over_uniform_timesteps_though_the_sample_is_stratified(tmp_path, runs):
    run, table = stratified_run(tmp_path, runs[0])
    curves = frames.curves_frame([run]).set_index(["metric", "step"])["value"]
    for step in (10, 20):
        val, train = (table[(table.step == step) & (table.split == split)] for split in ("val", "train"))
        assert curves["loss/val", step] == pytest.approx(uniform_mean(val, 0, 1000))
        assert curves["loss/train_mse", step] == pytest.approx(uniform_mean(train, 0, 1000))
        assert curves["loss/val_low_noise", step] == pytest.approx(uniform_mean(val, 0, 250))
        assert curves["loss/val_high_noise", step] == pytest.approx(uniform_mean(val, 750, 1000))
    row = frames.runs_frame([run]).iloc[0]
    assert row.val_loss == curves["loss/val", 20]
    assert row.low_noise == curves["loss/val_low_noise", 20]
    assert row.high_noise == curves["loss/val_high_noise", 20]
    truth = 2.0 * np.exp(-np.arange(1000) / 50)
    assert row.val_loss == pytest.approx(truth.mean(), abs=0.1)  # 1.0 if all samples weighed the same


def test_a_quarter_leaves_out_the_part_of_a_task_without_samples_and_the_whole_does_not(tmp_path, runs):
    run, table = stratified_run(tmp_path, runs[0], skipped=range(40, 250))
    val = table[(table.step == 20) & (table.split == "val")]
    row = frames.runs_frame([run]).iloc[0]
    assert row.low_noise == pytest.approx(uniform_mean(val, 0, 40))
    unmeasured = run.assign(val_loss=run.val_loss.where(run.task != 1, 0.0))
    assert np.isnan(frames.runs_frame([unmeasured]).iloc[0].val_loss)
