"""Standard errors: their closed forms, their units, and runs as clusters."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from analysis import conflict, gramians, jackknife, moments
from lightning_modules.errors import UserInputError
from tests.analysis.simulation import ABOVE, COSINES, simulated, true_gradients


def series(values, run=None):
    probes = xr.DataArray(np.asarray(values, float), dims="gradient_step")
    return probes if run is None else probes.assign_coords(run=("gradient_step", run))


def pooled(values, run=None):
    probes = series(values, run)
    return jackknife.pool_series(xr.Dataset({"x": probes}), probes)


def mean(means):
    return means["x"]


def test_error_of_a_mean_is_the_usual_one():
    values = np.random.default_rng(0).standard_normal(20)
    got = pooled(values).estimate("x", mean)
    assert float(got.x) == pytest.approx(values.mean())
    assert float(got.standard_error) == pytest.approx(values.std(ddof=1) / np.sqrt(20))
    assert got.attrs == {"units": 20, "runs": 1, "errors": "probes"}
    t = stats.t.ppf(0.975, 19)
    assert float(jackknife.half_width(got)) == pytest.approx(t * float(got.standard_error))


def test_error_of_a_ratio_is_that_of_the_delta_method():
    rng = np.random.default_rng(1)
    top, bottom = rng.standard_normal((2, 30)) * 0.1 + [[2], [5]]
    probes = series(top)
    pool = jackknife.pool_series(xr.Dataset({"top": probes, "bottom": series(bottom)}), probes)
    got = pool.estimate("ratio", lambda means: means["top"] / means["bottom"])
    linear = (top - top.mean() / bottom.mean() * bottom) / bottom.mean()
    assert float(got.standard_error) == pytest.approx(linear.std(ddof=1) / np.sqrt(30), rel=0.02)


def test_unequal_units_weigh_by_their_probes():
    """Against delete-m_j written out (Busing et al. 1999, equations 5 to 8)."""
    values, run = np.arange(9.0) ** 2, [0, 0, 0, 0, 0, 1, 1, 2, 2]
    got = pooled(values, run).estimate("x", mean, "runs")
    n, m = 9, np.array([5, 2, 2])
    sums = np.array([values[:5].sum(), values[5:7].sum(), values[7:].sum()])
    without, h = (values.sum() - sums) / (n - m), n / m
    centre = 3 * values.mean() - ((1 - m / n) * without).sum()
    pseudo = h * values.mean() - (h - 1) * without
    assert float(got.x) == pytest.approx(values.mean())
    assert float(got.standard_error) == pytest.approx(np.sqrt(((pseudo - centre) ** 2 / (h - 1)).sum() / 3))
    assert got.attrs == {"units": 3, "runs": 3, "errors": "runs"}


def test_batches_are_consecutive_and_never_cross_runs():
    run = np.repeat([4, 7], [100, 41])
    pool = pooled(np.ones(141), run)
    assert len(pool.probes) == jackknife.MAX_UNITS
    assert pool.probes.sum() == 141
    assert pool.probes[pool.run == 4].sum() == 100
    assert set(pool.probes[pool.run == 4]) <= {6, 7}
    assert pooled(np.ones(7)).probes.tolist() == [1] * 7
    assert len(pooled(np.ones(80), np.repeat(np.arange(40), 2)).probes) == 40  # each run at least one unit


def test_a_run_in_several_pieces_is_one_cluster():
    values, run = np.array([1.0, 5.0, 2.0, 9.0, 4.0, 8.0]), [3, 7, 3, 7, 1, 1]
    got = pooled(values, run).estimate("x", mean, "runs")
    means = np.array([1.5, 7.0, 6.0])
    assert float(got.standard_error) == pytest.approx(means.std(ddof=1) / np.sqrt(3))
    assert got.attrs == {"units": 3, "runs": 3, "errors": "runs"}


def test_statistics_get_their_labels_back():
    data = simulated(12, 3)
    pool = jackknife.pool_probes(data.gramian, data.group_count, halved=False)
    assert list(pool.sums) == ["product"]
    got = pool.estimate("total", lambda means: means["product"].sum("other_task"))
    assert list(got["layer"].values) == list(data["layer"].values)
    assert list(got["interval"].values) == list(data["interval"].values)
    assert not [name for name in got.coords if str(name).startswith("other_")]
    assert got.standard_error.dims == got.total.dims


def test_unknown_probes_are_left_out():
    values = np.array([1.0, np.nan, 4.0, 3.0])
    got = pooled(values).estimate("x", mean)
    assert float(got.x) == pytest.approx(8 / 3)
    assert np.isfinite(float(got.standard_error))
    assert np.isnan(float(pooled([2.0]).estimate("x", mean).standard_error))


def test_few_units_need_a_stronger_signal():
    assert jackknife.signal_threshold(2) == pytest.approx(13.97, abs=0.01)
    assert jackknife.signal_threshold(32) == pytest.approx(2.08, abs=0.01)
    assert jackknife.signal_threshold(1) == np.inf
    assert bool(pooled([1.0, 1.1, 1.2]).is_positive(mean))
    assert not bool(pooled([1.0, 2.0]).is_positive(mean))
    assert not bool(pooled([1.0]).is_positive(mean))


def test_sums_over_units_are_those_of_the_probes(monkeypatch):
    """In any number of pieces."""
    data = simulated(70, 3)
    expected = moments.probe_moments(data.gramian, data.group_count).mean("gradient_step")
    for chunk in (moments._CHUNK_BYTES, 1):
        monkeypatch.setattr(moments, "_CHUNK_BYTES", chunk)
        pool = jackknife.pool_probes(data.gramian, data.group_count, series={"step": data.gradient_step * 1.0})
        xr.testing.assert_allclose(pool.means.drop_vars("step"), expected)
        assert float(pool.means["step"]) == pytest.approx(34.5)
        assert len(pool.probes) == jackknife.MAX_UNITS


def runs_that_differ(runs, probes, copies, seed=0):
    """Each run has true gradients of its own, around common ones."""
    rng = np.random.default_rng(seed)
    own = true_gradients() + 0.25 * rng.standard_normal((runs, copies, *true_gradients().shape))
    data = simulated(runs * probes, copies, means=np.repeat(own, probes, axis=0), traces=np.full(4, 4.0), seed=seed)
    run = ("gradient_step", np.repeat(np.arange(runs), probes))
    return data.gramian.assign_coords(run=run), data.group_count, own


def test_runs_are_clusters():
    """Where networks differ, errors over probes are too small for a claim about other networks; over runs they hold."""
    gramian, count, own = runs_that_differ(runs=8, probes=12, copies=120)
    gram = np.einsum("rckp,rclp->kl", own, own) / own[..., 0, 0].size  # of the average network, its norms included
    truth = gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    coverage = {}
    for errors in ("probes", "runs"):
        found = conflict.corrected_cosine(gramian, count, errors=errors)
        inside = np.abs(found.cosine - truth) <= jackknife.half_width(found)
        coverage[errors] = inside.values[:, *ABOVE].mean()
        assert found.attrs["runs"] == 8
    assert coverage["probes"] < 0.85
    assert 0.90 < coverage["runs"] < 0.99
    assert np.abs(truth - COSINES).max() < 0.3


def test_errors_over_runs_need_runs(runs):
    gramian, count = gramians.pool_runs(runs[:1])
    with pytest.raises(UserInputError, match="two runs, and these probes come from one"):
        conflict.corrected_cosine(gramian, count, errors="runs")
    two = conflict.plain_cosine(*gramians.pool_runs(runs[:2]), errors="runs")
    assert two.attrs == {"units": 2, "runs": 2, "errors": "runs"}


def test_an_error_is_quoted_from_enough_probes_that_differ():
    for units, error, quoted in ((8, 0.1, True), (7, 0.1, False), (8, 0.0, False)):
        found = xr.Dataset({"standard_error": xr.DataArray(error)}, attrs={"units": units})
        assert bool(np.isfinite(jackknife.quotable_error(found))) is quoted
