import json

import numpy as np
import xarray as xr

from analysis.grouping import group_by_method, mean_over_runs, stack_runs, with_same_blocks


def test_runs_are_grouped_in_the_order_of_methods(runs):
    groups = group_by_method(runs[::-1])
    assert list(groups) == ["baseline", "random", "dtr"]
    assert {run.attrs["seed"] for run in groups["dtr"]} == {0, 1, 2}
    assert all(run.attrs["method"] == method for method, own in groups.items() for run in own)


def test_runs_with_other_blocks_are_left_out(runs):
    manifest = json.loads(runs[1].attrs["manifest"]) | {"block_channels": {"blocks.0": 16}}
    other = runs[1].assign_attrs(manifest=json.dumps(manifest))
    kept = with_same_blocks([runs[0], other, runs[2]])
    assert [run.attrs["seed"] for run in kept] == [0, 2]


def test_means_over_runs_leave_out_what_is_missing():
    values = [xr.DataArray([1.0, 2.0], dims="task"), xr.DataArray([3.0, np.nan], dims="task")]
    np.testing.assert_array_equal(mean_over_runs(values), [2.0, 2.0])
    assert stack_runs(values).dims == ("run", "task")
