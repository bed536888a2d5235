"""Affinities in their common form: values, errors and significance against the statistics they are made of."""

import functools
import itertools

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from analysis import affinity, conflict, update
from analysis.gramians import pool_runs
from lightning_modules.errors import UserInputError
from tests.analysis import synthetic
from tests.analysis.simulation import simulated
from tests.analysis.synthetic import K

ABOVE = np.triu_indices(K, 1)
FORM = {"interval", "t_low", "t_high", "log_snr", "task"}


def of(runs, method="baseline"):
    return [run for run in runs if run.attrs["method"] == method]


def assert_in_form(matrix, *, directed):
    assert matrix.dims[-2:] == ("task", "other_task")
    assert FORM | {f"other_{name}" for name in FORM} <= set(matrix.coords)
    assert matrix.attrs["directed"] is directed
    assert matrix.attrs["long_name"]
    if "standard_error" in matrix.coords:
        assert matrix["standard_error"].dims == matrix.dims


def test_gradient_affinity_finds_the_two_groups(runs):
    got = affinity.gradient_affinity(runs[0])
    above = ABOVE
    same = (synthetic.true_cosine() == synthetic.WITHIN)[above]
    assert got.values[above][same].min() > 0.4
    assert got.values[above][~same].max() < 0.1
    plain = affinity.gradient_affinity(runs[0], corrected=False)
    assert np.abs(plain.values[above]).mean() < 0.5 * np.abs(got.values[above]).mean()
    by_block = affinity.gradient_affinity(runs[0], level="block")
    assert by_block.block.values.tolist() == ["x_embedder", "blocks.0", "blocks.1", "final_layer"]
    assert by_block.dims == ("block", "task", "other_task")


def test_mask_overlap_equals_brute_force(runs):
    run = next(run for run in runs if run.attrs["method"] == "dtr")
    masks = run["mask"].values
    expected = np.zeros((K, K))
    width = synthetic.T // K
    for i, j in itertools.product((0, 3, 7), repeat=2):
        pairs = itertools.product(range(i * width, (i + 1) * width), range(j * width, (j + 1) * width))
        scores = [(mask[a] & mask[b]).sum() / (mask[a] | mask[b]).sum() for a, b in pairs for mask in masks]
        expected[i, j] = np.mean(scores)
        assert affinity.mask_overlap(run).values[i, j] == pytest.approx(expected[i, j])
    assert list(affinity.mask_overlap(run).interval.values) == list(run.interval.values)


def test_mask_overlap_weighs_blocks_with_different_masks(runs):
    run = next(run for run in runs if run.attrs["method"] == "dtr").copy(deep=True)
    shared = affinity.mask_overlap(run)
    run["mask"][1] = True
    np.testing.assert_allclose(affinity.mask_overlap(run), (shared + 1) / 2)


def test_every_affinity_has_the_common_form(runs):
    assert_in_form(affinity.gradient_affinity(runs[0]), directed=False)
    assert_in_form(affinity.gradient_affinity(runs[0], level="block"), directed=False)
    assert_in_form(affinity.tag_affinity(runs[0], 0.1), directed=True)
    assert_in_form(affinity.mask_overlap(of(runs, "dtr")[0]), directed=False)


@pytest.mark.parametrize("errors", ["probes", "runs"])
def test_values_and_errors_are_those_of_the_statistics(runs, errors):
    own = of(runs)
    gramian, count = pool_runs(own)
    for corrected, measure in ((True, conflict.corrected_cosine), (False, conflict.plain_cosine)):
        got, expected = (
            affinity.gradient_affinity(own, corrected=corrected, errors=errors),
            measure(gramian, count, errors=errors),
        )
        np.testing.assert_array_equal(got, expected["cosine"])
        np.testing.assert_array_equal(got["standard_error"], expected["standard_error"])
        assert got.attrs["units"] == expected.attrs["units"]
    loss = xr.concat([run["group_loss"] for run in own], "gradient_step")
    got, expected = (
        affinity.tag_affinity(own, 0.1, errors=errors),
        update.first_order_tag(gramian, count, loss, 0.1, errors=errors),
    )
    np.testing.assert_array_equal(got, expected["affinity"])
    np.testing.assert_array_equal(got["standard_error"], expected["standard_error"])


def test_a_rate_for_every_step_holds_in_all_runs(runs):
    own = of(runs)
    rate = xr.DataArray(np.linspace(0.1, 0.01, len(synthetic.STEPS)), {"gradient_step": synthetic.STEPS})
    got = affinity.tag_affinity(own, rate)
    scaled = [run.assign(gramian=run["gramian"] * rate) for run in own]
    np.testing.assert_allclose(got, affinity.tag_affinity(scaled, 1.0), rtol=1e-5)


@pytest.mark.parametrize("windows", [1, 3, 10])
def test_a_film_has_the_pooled_statistic_of_every_window(runs, windows):
    own = of(runs)
    film = affinity.gradient_affinity_film(own, windows=windows)
    assert film.dims == ("window", "task", "other_task")
    assert_in_form(film, directed=False)
    parts = np.array_split(synthetic.STEPS, windows)
    assert film["first_step"].values.tolist() == [part[0] for part in parts]
    assert film["last_step"].values.tolist() == [part[-1] for part in parts]
    for at, part in enumerate(parts):
        inside = [run.sel(gradient_step=part) for run in own]
        expected = affinity.gradient_affinity(inside)
        np.testing.assert_array_equal(film[at], expected)
        np.testing.assert_array_equal(film["standard_error"][at], expected["standard_error"])
    assert film.attrs["units"] == len(own) * min(len(part) for part in parts)


def test_a_film_of_any_measure_and_of_runs_of_different_lengths(runs):
    longer, shorter = of(runs)[0], of(runs)[1].isel(gradient_step=slice(0, 5))
    film = affinity.affinity_film(
        [longer, shorter], functools.partial(affinity.tag_affinity, learning_rate=0.1), windows=2
    )
    assert_in_form(film, directed=True)
    late = longer.isel(gradient_step=slice(5, None))
    np.testing.assert_array_equal(film[1], affinity.tag_affinity(late, 0.1))
    np.testing.assert_array_equal(
        film[0], affinity.tag_affinity([longer.isel(gradient_step=slice(0, 5)), shorter], 0.1)
    )
    with pytest.raises(ValueError, match=r"windows must lie in 1\.\.5"):
        affinity.gradient_affinity_film(shorter, windows=6)


def test_mean_over_runs_has_the_error_over_runs(runs):
    matrices = [affinity.gradient_affinity(run) for run in of(runs)]
    got = affinity.mean_over_runs(matrices)
    assert_in_form(got, directed=False)
    values = np.stack([matrix.values for matrix in matrices])
    np.testing.assert_allclose(got, values.mean(0))
    np.testing.assert_allclose(got["standard_error"], stats.sem(values, axis=0))
    assert got.attrs["units"] == 3
    holes = matrices[0].copy()
    holes[2, 3] = np.nan
    assert np.isnan(affinity.mean_over_runs([holes, *matrices[1:]]).values).sum() == 1
    assert affinity.mean_over_runs(matrices[:1])["standard_error"].isnull().all()


def in_form(values, error, *, directed, units=np.inf):
    matrix = xr.DataArray(values, dims=("task", "other_task"), attrs={"directed": directed, "units": units})
    return matrix.assign_coords(standard_error=(matrix.dims, error))


def test_significance_is_benjamini_hochbergs_by_hand():
    # p = 0.001, 0.03 and 0.2; at 5 % the k-th smallest must be at most 0.05 k / 3: 0.017, 0.033, 0.05.
    z = stats.norm.isf(np.array([0.001, 0.03, 0.2]) / 2)
    values = np.zeros((3, 3))
    values[0, 1], values[0, 2], values[1, 2] = z[0], -z[1], z[2]
    values += values.T
    np.fill_diagonal(values, 9.0)
    got = affinity.significant_cells(in_form(values, np.ones((3, 3)), directed=False))
    assert got.values.tolist() == [[False, True, True], [True, False, False], [True, False, False]]
    strict = affinity.significant_cells(in_form(values, np.ones((3, 3)), directed=False), 0.01)
    assert strict.values.sum() == 2
    few = affinity.significant_cells(in_form(values, np.ones((3, 3)), directed=False, units=3))
    assert not few.values.any()  # t with two degrees of freedom


def test_cells_of_a_directed_affinity_are_tests_of_their_own():
    values = np.zeros((3, 3))
    values[0, 1] = 5.0
    error = np.ones((3, 3))
    error[2, 1] = 0.0
    error[1, 2] = np.nan
    got = affinity.significant_cells(in_form(values, error, directed=True))
    assert np.argwhere(got.values).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="no standard errors"):
        affinity.significant_cells(in_form(values, error, directed=True).drop_vars("standard_error"))
    unknown = affinity.significant_cells(in_form(values, np.full((3, 3), np.nan), directed=True))
    assert not unknown.values.any()


def test_noise_alone_is_rarely_significant():
    # Gradients without any signal in 300 copies: the plain cosine is centred on zero.
    noise = simulated(steps=12, copies=300, means=np.zeros((4, 16)))
    matrix = affinity.gradient_affinity(noise, corrected=False, level="layer")
    by_copy = [affinity.significant_cells(matrix.isel(layer=at)).values.any() for at in range(300)]
    assert np.mean(by_copy) < 0.08
    signal = affinity.significant_cells(affinity.gradient_affinity(simulated(steps=60, copies=1), corrected=False))
    assert signal.values[0, 1]


def test_runs_without_the_data_are_refused(runs):
    with pytest.raises(ValueError, match="baseline-0 is not routed"):
        affinity.mask_overlap(runs[0])
    with pytest.raises(UserInputError, match="no gradient_conflict telemetry"):
        affinity.gradient_affinity(runs[0].drop_vars("gramian"))
    with pytest.raises(UserInputError, match="at least two runs"):
        affinity.gradient_affinity(runs[0], errors="runs")
