"""Optimal partitions against brute force over all of them, and what undefined pairs and ties do to them."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.affinity import gradient_affinity
from analysis.clustering import (
    Units,
    affinity_units,
    all_clusterings,
    cluster_intervals,
    log_snr_units,
    partition_cost,
    timestep_units,
)
from analysis.timestep_affinity import timestep_affinity
from tests.analysis import synthetic


def centre_and_cost(units, low, high, centre):
    """Of the cluster [low, high), member by member."""
    candidates = [(low + high) // 2] if centre == "middle" else range(low, high)
    costs = {c: sum(units.weights[u] * units.distances[c, u] for u in range(low, high)) for c in candidates}
    return min(costs.items(), key=lambda item: item[1])


def every_partition(size, clusters):
    for inner in itertools.combinations(range(1, size), clusters - 1):
        yield (0, *inner, size)


def brute_force(units, clusters, centre):
    """The smallest cost of all partitions."""
    return min(
        sum(centre_and_cost(units, low, high, centre)[1] for low, high in itertools.pairwise(splits))
        for splits in every_partition(units.size, clusters)
    )


def assert_consistent(units, found, centre):
    """That labels, centres, bounds and cost of a clustering belong together."""
    size, clusters = units.size, len(found.centres)
    assert (found.bounds[0], found.bounds[-1], len(found.bounds)) == (0, units.edges[-1], clusters + 1)
    assert all(isinstance(bound, int) for bound in found.bounds)
    splits = [units.edges.tolist().index(bound) for bound in found.bounds]
    assert found.labels.tolist() == list(np.repeat(np.arange(clusters), np.diff(splits)))
    assert len(found.labels) == size
    total = 0.0
    for at, (low, high) in enumerate(itertools.pairwise(splits)):
        assert low <= found.centres[at] < high
        members = range(low, high)
        own = sum(units.weights[u] * units.distances[found.centres[at], u] for u in members)
        assert own == pytest.approx(centre_and_cost(units, low, high, centre)[1], abs=1e-9)
        total += own
    assert found.cost == pytest.approx(total, abs=1e-9)
    assert partition_cost(units, found.bounds, centre=centre) == pytest.approx(total, abs=1e-9)


@st.composite
def any_units(draw):
    """Units of up to eight pieces of unequal width with any cost; zeros, ties and weightless units included."""
    size = draw(st.integers(1, 8))
    edges = np.cumsum([0, *draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["timestep", "log_snr", "affinity", "arbitrary"]))
    if kind == "timestep":
        return timestep_units(edges)
    if kind == "log_snr":
        return log_snr_units(edges, np.sort(rng.normal(0, 5, edges[-1]))[::-1])
    if kind == "affinity":
        values = rng.uniform(-1, 1.2, (size, size))
        values[rng.random((size, size)) < 0.2] = np.nan
        tasks = {"t_low": ("task", edges[:-1]), "t_high": ("task", edges[1:] - 1)}
        return affinity_units(xr.DataArray(values, tasks, ("task", "other_task")))
    distances = rng.integers(0, 3, (size, size)).astype(float)
    np.fill_diagonal(distances, 0.0)
    return Units(edges, distances, rng.integers(0, 3, size).astype(float), kind)


@settings(max_examples=150, deadline=None)
@given(any_units(), st.sampled_from(["medoid", "middle"]))
def test_no_partition_costs_less(units, centre):
    for clusters, found in enumerate(all_clusterings(units, units.size, centre=centre), 1):
        assert found.cost == pytest.approx(brute_force(units, clusters, centre), abs=1e-9)
        assert_consistent(units, found, centre)
        assert cluster_intervals(units, clusters, centre=centre).bounds == found.bounds


def test_one_cluster_and_as_many_as_units():
    units = log_snr_units(range(13), np.linspace(5, -7, 12))
    assert cluster_intervals(units, 1).bounds == (0, 12)
    assert cluster_intervals(units, 1).cost == pytest.approx(sum(abs(x - 6) for x in range(12)) * 12 / 11)
    every = cluster_intervals(units, 12)
    assert every.bounds == tuple(range(13))
    assert every.cost == 0
    assert every.centres.tolist() == list(range(12))
    single = timestep_units([0, 40])
    assert cluster_intervals(single, 1).bounds == (0, 40)
    for clusters in (0, 13):
        with pytest.raises(ValueError, match=r"num_clusters must lie in 1\.\.12"):
            cluster_intervals(units, clusters)


@pytest.mark.parametrize(("timesteps", "clusters"), [(1000, 5), (1000, 8), (100, 4), (37, 1)])
def test_the_timestep_cost_gives_equal_widths_and_ends_at_the_last_timestep(timesteps, clusters):
    units = timestep_units(range(timesteps + 1))
    expected = tuple(range(0, timesteps + 1, timesteps // clusters))
    for centre in ("medoid", "middle"):
        assert cluster_intervals(units, clusters, centre=centre).bounds == expected


def test_the_log_snr_cost_follows_log_snr():
    # Steep at both ends, flat in the middle: half of the timesteps share one value.
    snr = np.concatenate([np.linspace(10, 2, 25), np.full(50, 0.0), np.linspace(-2, -10, 25)])
    found = cluster_intervals(log_snr_units(range(101), snr), 3)
    assert 10 < found.bounds[1] <= 25
    assert 75 <= found.bounds[2] < 90
    with pytest.raises(ValueError, match="log-SNR is not finite for unit 99"):
        log_snr_units(range(101), [*snr[:-1], -np.inf])
    assert np.isfinite(log_snr_units([0, 50, 100], [*snr[:-1], -np.inf]).distances).all()
    with pytest.raises(ValueError, match="100 values of log-SNR"):
        log_snr_units(range(51), snr)


def test_an_interval_counts_as_many_times_as_it_has_timesteps():
    rng = np.random.default_rng(0)
    widths = np.array([3, 1, 2, 4])
    edges = np.cumsum([0, *widths])
    distances = rng.random((4, 4))
    np.fill_diagonal(distances, 0)
    whole = Units(edges, distances, widths.astype(float), "test")
    at = np.repeat(np.arange(4), widths)
    single = Units(np.arange(11), distances[np.ix_(at, at)], np.ones(10), "test")
    for clusters in range(1, 5):
        found = cluster_intervals(whole, clusters)
        # Dividing an interval cannot help, as its timesteps are alike.
        assert cluster_intervals(single, clusters).cost == pytest.approx(found.cost)
        assert partition_cost(single, found.bounds) == pytest.approx(found.cost)


def test_zero_costs_are_costs():
    # ANT's script takes zero for "not computed yet" and finds nothing here.
    same = Units(np.arange(7), np.zeros((6, 6)), np.ones(6), "equal")
    for clusters in range(1, 7):
        found = cluster_intervals(same, clusters)
        assert found.cost == 0
        assert_consistent(same, found, "medoid")


def test_gradient_affinity_recovers_the_two_groups(runs):
    for corrected in (True, False):
        matrix = gradient_affinity(runs[0], corrected=corrected)
        found = cluster_intervals(affinity_units(matrix), 2)
        assert found.bounds == (0, synthetic.T // 2, synthetic.T)
        assert found.labels.tolist() == [0] * (synthetic.K // 2) + [1] * (synthetic.K // 2)
    assert found.name == "gradient affinity"


def grouped_timesteps(timesteps=60, size=400, signal=1.0, seed=0):
    """Sketches of gradients of three groups of timesteps: the first third, the second, and the last without signal."""
    rng = np.random.default_rng(seed)
    groups = rng.standard_normal((3, size))
    groups /= np.linalg.norm(groups, axis=1, keepdims=True)
    groups[2] = 0
    truth = signal * groups[np.arange(timesteps) * 3 // timesteps]
    return truth + 0.3 * rng.standard_normal((2, timesteps, size)) / np.sqrt(size)


def test_timesteps_without_signal_have_no_say():
    steps = np.arange(60)
    found = timestep_affinity(grouped_timesteps(), steps, -0.2 * steps)
    undefined = np.isnan(found["cosine"].values).all(0)
    assert undefined[40:].mean() > 0.9
    units = affinity_units(found["cosine"])
    assert not units.weights[undefined].any()
    clusters = cluster_intervals(units, 2)
    assert clusters.bounds == (0, 20, 60)


def test_no_cluster_is_spent_on_what_is_not_known():
    at = np.arange(9)
    values = np.full((9, 9), np.nan)
    values[:6, :6] = np.exp(-np.abs(at[:6, None] - at[:6]) / 3)
    whole = affinity_units(xr.DataArray(values, {"timestep": at}, ("timestep", "other_timestep")))
    known = affinity_units(xr.DataArray(values[:6, :6], {"timestep": at[:6]}, ("timestep", "other_timestep")))
    for one, other in zip(all_clusterings(whole, 6), all_clusterings(known, 6), strict=True):
        assert one.cost == pytest.approx(other.cost)
        assert one.bounds == (*other.bounds[:-1], 9)


def test_a_bound_among_unknown_timesteps_stands_in_their_middle():
    values = np.full((10, 10), -0.5)
    values[:3, :3] = values[7:, 7:] = 1.0
    values[3:7] = values[:, 3:7] = np.nan
    matrix = xr.DataArray(values, {"timestep": np.arange(10)}, ("timestep", "other_timestep"))
    units = affinity_units(matrix)
    assert cluster_intervals(units, 2).bounds == (0, 5, 10)
    assert cluster_intervals(units, 2).cost == 0
    # In one cluster, an unknown timestep is no centre, though it would be nearer to both sides than they are.
    one = cluster_intervals(units, 1)
    assert one.centres[0] not in range(3, 7)
    assert one.cost == pytest.approx(3 * 1.5)


def test_what_a_pair_costs():
    values = np.array([[1.0, 1.2, np.nan], [0.4, 1.0, -1.0], [0.3, np.nan, np.nan]])
    tasks = {"t_low": ("task", [0, 10, 30]), "t_high": ("task", [9, 29, 59])}
    units = affinity_units(xr.DataArray(values, tasks, ("task", "other_task"), name="help"))
    np.testing.assert_allclose(units.distances, [[0, 0, 1], [0.6, 0, 2], [0.7, 1, 0]])
    assert units.edges.tolist() == [0, 10, 30, 60]
    assert units.weights.tolist() == [10, 20, 30]
    assert units.name == "help"


def test_sparse_timesteps_stand_for_their_neighbourhood():
    matrix = xr.DataArray(np.eye(4), {"timestep": [0, 3, 6, 9]}, ("timestep", "other_timestep"))
    assert affinity_units(matrix).edges.tolist() == [0, 2, 5, 8, 10]
    assert affinity_units(matrix, num_timesteps=12).edges.tolist() == [0, 2, 5, 8, 12]


def test_a_thousand_timesteps_take_seconds():
    rng = np.random.default_rng(1)
    values = rng.uniform(-1, 1, (1000, 1000))
    matrix = xr.DataArray(values + values.T, {"timestep": np.arange(1000)}, ("timestep", "other_timestep"))
    began = time.process_time()
    found = cluster_intervals(affinity_units(matrix), 8)
    assert time.process_time() - began < 6
    assert found.bounds[-1] == 1000


def test_impossible_units_are_refused():
    one = np.zeros((2, 2))
    for edges in ([0, 2, 2], [1, 2, 3], [0]):
        with pytest.raises(ValueError, match="edges must start at 0 and increase"):
            Units(np.array(edges), one, np.ones(2), "x")
    with pytest.raises(ValueError, match="2 units need distances"):
        Units(np.arange(3), np.zeros((3, 3)), np.ones(2), "x")
    for distances, weights in ((one * np.nan, np.ones(2)), (one, np.array([1.0, -1.0]))):
        with pytest.raises(ValueError, match="must have finite distances and finite weights"):
            Units(np.arange(3), distances, weights, "x")
    with pytest.raises(ValueError, match="divide no unit"):
        partition_cost(timestep_units([0, 10, 20]), [0, 5, 20])
