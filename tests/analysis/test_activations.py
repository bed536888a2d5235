import numpy as np
import pytest
import xarray as xr

from analysis import activations, affinity


def energy(rows):
    return xr.DataArray(np.asarray(rows, float), dims=("task", "channel"))


def test_used_and_dead_channels():
    m = energy([[1.0, 0.0, 2.0, 1e-5], [1.0, 3.0, 0.0, 1e-5]])
    np.testing.assert_array_equal(activations.used_channels(m), [[1, 0, 1, 0], [1, 1, 0, 0]])
    assert float(activations.dead_fraction(m)) == 0.25
    narrow = energy([[1.0, 0.0, np.nan, np.nan], [1.0, 0.0, np.nan, np.nan]])
    assert float(activations.dead_fraction(narrow)) == 0.5
    silent = energy([[0.0, 0.0], [1.0, 1.0]])
    np.testing.assert_array_equal(activations.used_channels(silent), [[0, 0], [1, 1]])


@pytest.mark.parametrize("active", [1, 3, 8])
def test_effective_channels_counts_equal_channels(active):
    m = energy([[2.5] * active + [0.0] * (8 - active)])
    assert activations.effective_channels(m).item() == pytest.approx(active)


def test_specialisation_of_shared_private_and_loud():
    m = energy([[1.0, 0.0, 1.0], [1.0, 2.0, 0.0]])
    got = activations.specialisation(xr.concat([m, m], "block"))
    assert got.dims == ("block", "channel")
    # Task 0: (1/2, 0, 1/2); task 1: (1/3, 2/3, 0). Channel 0 is split 3:2.
    entropy = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4)) / np.log(2)
    np.testing.assert_allclose(got[0], [1 - entropy, 1.0, 1.0])
    loud = energy([[1.0, 1.0], [9.0, 9.0]])
    np.testing.assert_allclose(activations.specialisation(loud), 0.0, atol=1e-12)
    assert activations.specialisation(energy([[1.0, 0.0], [1.0, 0.0]]))[1].isnull()


def test_active_overlap_of_a_routed_run_follows_its_masks(runs):
    plain, dtr = runs[0], next(run for run in runs if run.attrs["method"] == "dtr")
    per_run = []
    for run in (plain, dtr):
        last = run.activation_mean_square.isel(activation_step=-1).sel(site="input")
        per_run.append(activations.active_overlap(last))
    np.testing.assert_allclose(per_run[0], 1.0)
    assert per_run[1].values[0, -1] < 0.7
    assert per_run[1].values[0, -1] == pytest.approx(affinity.mask_overlap(dtr).values[0, -1], abs=0.15)
    assert list(per_run[1].other_interval.values) == list(dtr.interval.values)
