import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from analysis import axes
from analysis.axes import add_axes, seed_curves
from lightning_modules.errors import UserInputError
from tests.analysis import synthetic
from tests.analysis.tidy import tidy


def run(name, method="baseline", *, clock=None, **fields):
    """A run with a manifest and, if given, readings of its clock (step -> seconds)."""
    manifest = json.loads(synthetic.manifest(method).to_json()) | fields
    data = {} if clock is None else {"training_seconds": ("clock_step", list(clock.values()))}
    coords = {} if clock is None else {"clock_step": list(clock)}
    return xr.Dataset(data, coords, attrs={"run_id": name, "method": method, "manifest": json.dumps(manifest)})


def test_axes_by_hand():
    curves = tidy(baseline_0=[4, 3, 2, 1], dtr_0=[3, 2])
    runs = [
        run("baseline_0", clock={50: 10.0, 150: 40.0, 300: 100.0}, batch_size=32, flops_per_sample=2.0),
        run("dtr_0", batch_size=8),
        run("not_asked_for"),
    ]
    got = add_axes(curves, runs)
    assert list(got.columns) == axes.CURVE_COLUMNS
    own = got[got["run"] == "baseline_0"]
    assert own["samples"].tolist() == [3200, 6400, 9600, 12800]
    assert own["flops"].tolist() == [6400, 12800, 19200, 25600]
    # 100 lies in the middle of 50 and 150, 200 a third of the way from 150 to 300; 400 is beyond the last reading.
    np.testing.assert_allclose(own["seconds"], [25, 60, 100, np.nan])
    other = got[got["run"] == "dtr_0"]
    assert other["samples"].tolist() == [800, 1600]
    assert other[["seconds", "flops"]].isna().all(axis=None)
    assert got["value"].tolist() == curves["value"].tolist()
    assert axes.known_axes(got) == ["step", "samples"]
    assert axes.known_axes(got[got["method"] == "baseline"]) == ["step", "samples", "seconds", "flops"]


def test_the_clock_starts_at_zero():
    got = add_axes(tidy(steps=[0, 5], baseline_0=[2, 1]), [run("baseline_0", clock={10: 30.0})])
    assert got["seconds"].tolist() == [0.0, 15.0]


def test_curves_of_a_run_that_was_not_given_are_refused():
    with pytest.raises(ValueError, match=r"runs \['dtr_1'\], which are not among"):
        add_axes(tidy(baseline_0=[1], dtr_1=[1]), [run("baseline_0")])


def test_a_run_that_has_no_place_on_an_axis_is_named_with_the_cure():
    curves = add_axes(
        tidy(baseline_0=[4, 3], dtr_0=[3, 2], dtr_1=[3, 2]),
        [run("baseline_0", clock={200: 9.0}), run("dtr_0"), run("dtr_1")],
    )
    with pytest.raises(UserInputError, match=r"run dtr_0 \(dtr, seed 0\) and 1 more .* by seconds: its training"):
        seed_curves(curves, "loss/val", "seconds")
    with pytest.raises(UserInputError, match=r"run baseline_0 .* by flops: its manifest has no flops_per_sample"):
        seed_curves(curves, "loss/val", "flops")
    with pytest.raises(ValueError, match=r"no column 'seconds': put them through axes.add_axes"):
        seed_curves(tidy(baseline_0=[1]), "loss/val", "seconds")


def test_seed_curves_are_sorted_and_leave_out_what_no_clock_reached():
    curves = add_axes(tidy(dtr_1=[3, 2, 1], baseline_0=[6, 5, 4]), [run("dtr_1", clock={250: 5.0}), run("baseline_0")])
    got = seed_curves(curves.iloc[::-1], "loss/val")
    assert list(got) == [("baseline", 0), ("dtr", 1)]
    assert got["dtr", 1].x.tolist() == [100, 200, 300]
    assert got["dtr", 1].value.tolist() == [3, 2, 1]
    timed = seed_curves(curves[curves["method"] == "dtr"], "loss/val", "seconds")["dtr", 1]
    assert timed.x.tolist() == [2.0, 4.0]
    assert timed.value.tolist() == [3, 2]
    assert seed_curves(curves, "another metric") == {}


def test_runs_of_one_seed_are_averaged_and_a_diverged_one_is_not_hidden():
    first, second = tidy(dtr_0=[4, 3, 2]), tidy(dtr_0=[6, np.nan, 4, 2]).assign(run="again")
    both = pd.concat([first, second], ignore_index=True)
    value = seed_curves(both, "loss/val")["dtr", 0].value
    np.testing.assert_array_equal(value, [5, np.nan, 3, 2])
    runs = [run("dtr_0", clock={400: 40.0}), run("again", clock={400: 80.0})]
    timed = seed_curves(add_axes(both, runs), "loss/val", "seconds")["dtr", 0]
    np.testing.assert_allclose(timed.x, [15, 30, 45, 80])
    np.testing.assert_array_equal(timed.value, value)
