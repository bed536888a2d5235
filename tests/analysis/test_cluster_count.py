"""The number of clusters: two known groups are found, noise and a line are not taken for structure."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from sklearn.metrics import silhouette_samples

from analysis.affinity import gradient_affinity
from analysis.cluster_count import NO_STRUCTURE, interleaved, predicted_count, silhouette_count
from analysis.clustering import Units, affinity_units, cluster_intervals, timestep_units
from tests.analysis import synthetic


def blocks(sizes, within=0.9, between=0.1):
    group = np.repeat(np.arange(len(sizes)), sizes)
    values = np.where(group[:, None] == group, within, between)
    np.fill_diagonal(values, 1.0)
    return values


def in_form(values, error=None):
    size = len(values)
    tasks = {"t_low": ("task", 10 * np.arange(size)), "t_high": ("task", 10 * np.arange(size) + 9)}
    matrix = xr.DataArray(values, tasks, ("task", "other_task"), name="affinity")
    return matrix if error is None else matrix.assign_coords(standard_error=(matrix.dims, np.full((size, size), error)))


def measurements(rng, truth, noise, count):
    """Independent symmetric measurements of one affinity."""
    found = []
    for _ in range(count):
        spread = np.triu(noise * rng.standard_normal(truth.shape), 1)
        found.append(in_form(truth + spread + spread.T, noise))
    return found


def test_silhouettes_are_rousseeuws():
    rng = np.random.default_rng(0)
    at = np.sort(rng.random(9))
    units = Units(np.arange(10), np.abs(at[:, None] - at), np.ones(9), "line")
    found = silhouette_count(units)
    assert found.scores.index.tolist() == list(range(2, 9))
    for clusters in (2, 4, 8):
        labels = cluster_intervals(units, clusters).labels
        widths = []
        for unit in range(9):
            others = [np.mean(np.abs(at - at[unit])[labels == label]) for label in set(labels) - {labels[unit]}]
            own = labels == labels[unit]
            inside = np.abs(at - at[unit])[own].sum() / (own.sum() - 1) if own.sum() > 1 else np.nan
            widths.append((min(others) - inside) / max(min(others), inside) if own.sum() > 1 else 0.0)
        assert found.scores["value"][clusters] == pytest.approx(np.mean(widths))
        assert np.mean(widths) == pytest.approx(
            silhouette_samples(units.distances, labels, metric="precomputed").mean()
        )
    even = silhouette_count(timestep_units(units.edges))
    np.testing.assert_allclose(found.scores["even"], even.scores["value"])
    assert found.clusterings[3].bounds == cluster_intervals(units, 3).bounds


@pytest.mark.parametrize("sizes", [(4, 4), (2, 3, 3), (5, 2, 3, 4)])
def test_silhouettes_find_known_groups(sizes):
    found = silhouette_count(affinity_units(in_form(blocks(sizes))))
    assert found.best == len(sizes)
    assert found.clusterings[found.best].bounds == tuple(10 * np.cumsum([0, *sizes]))
    assert f"{len(sizes)} clusters of the affinity cost" in found.said
    assert found.scores["value"][found.best] > found.scores["even"][found.best]


def test_silhouettes_find_no_structure_where_all_are_equally_far():
    found = silhouette_count(affinity_units(in_form(blocks([1] * 8))))
    assert found.best is None
    assert found.said.startswith("No division")
    assert (found.scores["value"] <= NO_STRUCTURE).all()


def test_a_line_without_groups_is_recognised_by_its_own_reference():
    found = silhouette_count(timestep_units(range(0, 201, 25)))
    assert found.scores["value"][2] > 0.5, "silhouettes alone would call this structure"
    np.testing.assert_allclose(found.scores["value"], found.scores["even"])


def test_units_without_weight_are_left_out_of_silhouettes():
    values = blocks((4, 4))
    holes = np.full((10, 10), np.nan)
    holes[:8, :8] = values
    found, smaller = (silhouette_count(affinity_units(in_form(each)), 6) for each in (holes, values))
    np.testing.assert_allclose(found.scores["value"], smaller.scores["value"])
    assert found.best == 2
    with pytest.raises(ValueError, match="at least 3 units"):
        silhouette_count(timestep_units([0, 10, 20]))
    with pytest.raises(ValueError, match=r"max_clusters must lie in 1\.\.7, got 8"):
        silhouette_count(affinity_units(in_form(values)), 8)


def test_the_error_of_prediction_by_hand():
    # Three tasks, one division into {0, 1} and {2}; the means of cells by clusters of one predict the other.
    one = np.array([[1.0, 0.8, 0.0], [0.8, 1.0, 0.2], [0.0, 0.2, 1.0]])
    other = np.array([[1.0, 0.7, 0.1], [0.7, 1.0, 0.1], [0.1, 0.1, 1.0]])
    found = predicted_count([in_form(one), in_form(other)], 3)
    pairs = np.triu_indices(3, 1)  # (0, 1), (0, 2), (1, 2)
    errors = []
    for known, left_out in ((other[pairs], one[pairs]), (one[pairs], other[pairs])):
        by_clusters = [np.full(3, known.mean()), np.array([known[0], known[1:].mean(), known[1:].mean()]), known]
        errors.append([np.mean((left_out - means) ** 2) for means in by_clusters])
    errors = np.array(errors) / np.mean(np.array(errors)[:, 0])
    np.testing.assert_allclose(found.scores["value"], errors.mean(0))
    best = errors.mean(0).argmin()
    np.testing.assert_allclose(
        found.scores["standard_error"], (errors - errors[:, [best]]).std(0, ddof=1) / np.sqrt(2), atol=1e-12
    )
    assert found.best == 2


def test_noisy_cells_weigh_less():
    values = blocks((3, 3))
    rng = np.random.default_rng(1)
    noise = np.full((6, 6), 0.02)
    noise[0, :] = noise[:, 0] = 5.0
    found = []
    for _ in range(4):
        spread = np.triu(noise * rng.standard_normal((6, 6)), 1)
        matrix = in_form(values + spread + spread.T)
        found.append(matrix.assign_coords(standard_error=(matrix.dims, noise)))
    weighted = predicted_count(found)
    assert weighted.scores["value"].min() < 0.2
    equal = predicted_count([matrix.drop_vars("standard_error") for matrix in found])
    assert equal.scores["value"].min() > 0.5


@pytest.mark.parametrize(("truth", "noise", "best"), [((4, 4), 0.3, 2), ((3, 4, 3), 0.2, 3), ((8,), 0.3, None)])
def test_prediction_finds_the_groups_that_there_are(truth, noise, best):
    rng = np.random.default_rng(2)
    chosen = [predicted_count(measurements(rng, blocks(truth), noise, 5)).best for _ in range(20)]
    assert chosen.count(best) >= 15


def test_more_measurements_resolve_a_smooth_affinity_further():
    rng = np.random.default_rng(3)
    at = np.arange(12)
    smooth = np.exp(-np.abs(at[:, None] - at) / 6)
    rough, fine = (
        np.median([predicted_count(measurements(rng, smooth, noise, 5)).best or 1 for _ in range(9)])
        for noise in (0.4, 0.02)
    )
    assert rough < fine
    exact = predicted_count(measurements(rng, smooth, 1e-6, 3))
    assert (exact.best, exact.said.split()[:2]) == (12, ["All", "12"])


def test_probes_of_real_gramians_divide_into_the_two_groups(runs):
    own = [run for run in runs if run.attrs["method"] == "baseline"]
    parts = [interleaved(run, 3) for run in own]
    replicates = [gradient_affinity([part[at] for part in parts]) for at in range(3)]
    found = predicted_count(replicates)
    assert found.best == 2
    assert found.clusterings[2].bounds == (0, synthetic.T // 2, synthetic.T)
    assert silhouette_count(affinity_units(gradient_affinity(own))).best == 2


def test_interleaved_probes_are_a_partition(runs):
    parts = interleaved(runs[0], 3)
    assert sorted(step for part in parts for step in part["gradient_step"].values) == synthetic.STEPS.tolist()
    assert {part.sizes["gradient_step"] for part in parts} == {3, 4}
    with pytest.raises(ValueError, match=r"parts must lie in 1\.\.10"):
        interleaved(runs[0], 11)


def test_replicates_without_a_common_pair_are_refused():
    with pytest.raises(ValueError, match="at least two, got 1"):
        predicted_count([in_form(blocks((2, 2)))])
    with pytest.raises(ValueError, match="no pair of tasks"):
        predicted_count([in_form(blocks((2, 2))), in_form(np.full((4, 4), np.nan))])
