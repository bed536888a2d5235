"""The negative-transfer gap against hand-computed losses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from analysis.specialists import (
    negative_transfer_gap,
    specialist_affinity,
    specialist_reach,
    usable_specialists,
)
from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import RunManifest
from tests.analysis.measured import K, with_losses

SHARED = np.linspace(0.5, 0.1, K)


def runs_of(seeds: dict[int, np.ndarray]):
    """Shared runs, and specialists whose loss on j is ratio[i, j] times the shared one's."""
    shared = [with_losses(SHARED * (1 + seed), seed=seed) for seed in seeds]
    alone = [
        with_losses(SHARED * (1 + seed) * ratio[task], seed=seed, task=task)
        for seed, ratio in seeds.items()
        for task in range(K)
    ]
    return shared, alone


def test_below_zero_the_others_did_harm():
    ratio = np.full((K, K), 5.0)
    np.fill_diagonal(ratio, np.linspace(0.8, 1.3, K))
    found = negative_transfer_gap(*runs_of({0: ratio}))
    np.testing.assert_allclose(found["gap"].values, np.linspace(-0.2, 0.3, K))
    assert found["low"].isnull().all(), "one seed gives no interval"
    affinity = specialist_affinity(*runs_of({0: ratio}))
    np.testing.assert_allclose(affinity.values, 1 - ratio)
    assert affinity.dims == ("task", "other_task")


def test_seeds_are_paired_and_give_the_interval():
    rng = np.random.default_rng(0)
    ratios = {seed: rng.uniform(0.7, 1.4, (K, K)) for seed in range(4)}
    shared, alone = runs_of(ratios)
    found = negative_transfer_gap(shared, list(reversed(alone)))
    stacked = np.stack(list(ratios.values()))
    gaps = np.einsum("skk->sk", stacked) - 1
    np.testing.assert_allclose(found["gap"].values, gaps.mean(0))
    expected = stats.t.interval(0.95, 3, loc=gaps.mean(0), scale=stats.sem(gaps))
    np.testing.assert_allclose([found["low"].values, found["high"].values], expected)
    affinity = specialist_affinity(shared, alone)
    np.testing.assert_allclose(affinity.values, 1 - stacked.mean(0))
    np.testing.assert_allclose(affinity["standard_error"].values, stats.sem(stacked))
    assert affinity.attrs["units"] == 4


def test_a_seed_without_all_specialists_does_not_count():
    ones = np.ones((K, K))
    shared, alone = runs_of({0: ones, 1: 2 * ones})
    assert negative_transfer_gap(shared, alone[:-1])["by_seed"]["seed"].values.tolist() == [0]
    with pytest.raises(UserInputError, match=r"no seed has both .* \[0, 1\]\) .* specialist of each of 8"):
        negative_transfer_gap(shared, alone[:3])
    with pytest.raises(UserInputError, match="dtr-lab specialists"):
        negative_transfer_gap(shared, [])


def test_the_reach_is_relative_to_the_specialist_of_the_task():
    rng = np.random.default_rng(1)
    ratios = {seed: rng.uniform(0.7, 4.0, (K, K)) for seed in range(3)}
    _, alone = runs_of(ratios)
    stacked = np.stack(list(ratios.values()))
    expected = -np.log(stacked / np.einsum("skk->sk", stacked)[:, None, :])
    found = specialist_reach(alone)
    np.testing.assert_allclose(found.values, expected.mean(0), atol=1e-12)
    np.testing.assert_allclose(found["standard_error"].values, stats.sem(expected), atol=1e-12)
    assert found["interval"].values.tolist() == found["other_interval"].values.tolist()
    assert found.attrs["directed"]
    with pytest.raises(UserInputError, match="specialist of each task"):
        specialist_reach(alone[:3])


def test_only_specialists_that_can_be_compared_are_used():
    shared, alone = runs_of({0: np.ones((K, K))})
    for run in (*shared, *alone):
        run.attrs["method"] = "baseline"
    routed = [run.assign_attrs(method="dtr") for run in (*shared, *alone[:2])]
    found, problems = usable_specialists([*shared, routed[0]], [*alone, *routed[1:]])
    assert list(found) == ["baseline"]
    assert len(found["baseline"]) == K
    assert len(problems) == 1
    assert problems[0].startswith("The specialists of DTR are left out: no seed has both")


def test_other_intervals_are_refused():
    shared, alone = runs_of({0: np.ones((K, K))})
    manifest = RunManifest.from_json(shared[0].attrs["manifest"])
    bounds = [*manifest.interval_bounds]
    bounds[1] += 1
    shared[0].attrs["manifest"] = dataclasses.replace(manifest, interval_bounds=bounds).to_json()
    with pytest.raises(UserInputError, match="different timestep intervals"):
        negative_transfer_gap(shared, alone)


def test_runs_that_could_stand_for_another_are_refused():
    shared, alone = runs_of({0: np.ones((K, K))})
    with pytest.raises(UserInputError, match="several runs stand for one in seed 0"):
        negative_transfer_gap([*shared, shared[0]], alone)
    with pytest.raises(UserInputError, match="several runs stand for one in seed 0"):
        negative_transfer_gap(shared, [*alone, alone[2]])
    with pytest.raises(UserInputError, match="there are none"):
        negative_transfer_gap(alone, alone)


def test_an_attempt_of_another_length_does_not_stand_in_the_way():
    shared, alone = runs_of({0: np.ones((K, K))})
    longer = [run.assign_coords(val_step=[50, 500]) for run in alone]
    runs, every = ([run.assign_attrs(method="baseline") for run in each] for each in (shared, [*longer, *alone]))
    found, problems = usable_specialists(runs, every)
    assert problems == []
    assert len(found["baseline"]) == K
    np.testing.assert_array_equal(specialist_reach(found["baseline"]).values, np.zeros((K, K)))
    np.testing.assert_allclose(negative_transfer_gap(runs, found["baseline"])["gap"].values, 0.0)
