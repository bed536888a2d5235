"""The negative-transfer gap against hand-computed losses."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.specialists import negative_transfer_gap, specialist_affinity
from lightning_modules.errors import UserInputError
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
