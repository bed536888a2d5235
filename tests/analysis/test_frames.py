import numpy as np
import pytest

from analysis import frames
from tests.analysis import synthetic


def test_curves_follow_the_true_losses(runs):
    curves = frames.curves_frame(runs)
    assert list(curves.columns) == ["run", "method", "seed", "step", "metric", "value"]
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
    assert frames.curves_frame([]).empty
