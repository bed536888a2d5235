"""Simulations with known truth: unit gradients in two groups, buried in noise."""

import numpy as np
import pytest
import xarray as xr

from analysis import conflict
from tests.analysis import synthetic
from tests.analysis.synthetic import HALVES, K

COUNT = np.tile([6, 10], K)  # unequal halves
ABOVE = np.triu_indices(K, 1)


def simulated(steps, *, seed=0, noise=40.0, signal=1.0, dim=256, halves=HALVES):
    """Gramians (gradient_step, task, half, other_task, other_half) and counts."""
    count = COUNT if halves == HALVES else np.full(K * halves, 8)
    gramian = synthetic.group_gramians(np.random.default_rng(seed), steps, dim, noise / signal**2, count)
    gramian = gramian.reshape(steps, K, halves, K, halves) * signal**2
    dims = ("gradient_step", "task", "half", "other_task", "other_half")
    counts = np.broadcast_to(count.reshape(K, halves), (steps, K, halves))
    return xr.DataArray(gramian, dims=dims), xr.DataArray(counts, dims=dims[:3])


def pure_noise(steps, seed=0):
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((steps, K * HALVES, 256)) / np.sqrt(COUNT)[:, None]
    gramian = (gradients @ gradients.transpose(0, 2, 1)).reshape(steps, K, HALVES, K, HALVES)
    like, count = simulated(steps)
    return like.copy(data=gramian), count


def test_task_gramian_is_the_gramian_of_count_weighted_means():
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((K, HALVES, 9))
    count = rng.integers(1, 9, (K, HALVES))
    dims = ("gradient_step", "task", "half", "other_task", "other_half")
    gramian = xr.DataArray(np.einsum("khp,lgp->khlg", gradients, gradients)[None], dims=dims)
    counts = xr.DataArray(count[None], dims=dims[:3])
    mean = (gradients * count[..., None]).sum(1) / count.sum(1)[:, None]
    got = conflict.task_gramian(gramian, counts)[0]
    np.testing.assert_allclose(got, mean @ mean.T, rtol=1e-12)
    normed = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(conflict.cosine(got), normed @ normed.T, rtol=1e-12)
    norms = conflict.squared_norms(gramian, counts)[0]
    np.testing.assert_allclose(norms, (gradients[:, 0] * gradients[:, 1]).sum(-1), rtol=1e-12)
    phi = conflict.magnitude_similarity(abs(norms))
    np.testing.assert_allclose(phi[0, 1], 2 * np.sqrt(abs(norms[0] * norms[1])) / (abs(norms[0]) + abs(norms[1])))


def test_a_task_without_samples_is_unknown_and_an_empty_half_is_ignored():
    gramian, count = simulated(1)
    empty_half = count.copy()
    empty_half[0, 2, 1] = 0
    broken = gramian.copy()
    broken[0, 2, 1] = np.nan
    broken[0, :, :, 2, 1] = np.nan
    got = conflict.task_gramian(broken, empty_half)[0]
    np.testing.assert_allclose(got[2, 2], gramian[0, 2, 0, 2, 0])
    empty_half[0, 2] = 0
    got = conflict.task_gramian(broken, empty_half)[0]
    assert got[2].isnull().all()
    assert got[3, 4].notnull()


def test_noise_hides_the_cosine_and_the_correction_finds_it():
    gramian, count = simulated(400)
    truth = synthetic.true_cosine()
    plain = conflict.cosine(conflict.task_gramian(gramian, count).mean("gradient_step")).values
    corrected = conflict.corrected_cosine(gramian, count)
    assert np.abs(plain - truth)[ABOVE].min() > 0.2
    error = np.abs(corrected.cosine.values - truth)
    assert error[ABOVE].max() < 0.1
    assert (error[ABOVE] < 4 * corrected.standard_error.values[ABOVE]).all()
    np.testing.assert_array_equal(np.diag(corrected.cosine), 1.0)


def test_more_than_two_halves_give_the_same_answer():
    gramian, count = simulated(400, halves=3)
    got = conflict.corrected_cosine(gramian, count).cosine.values
    np.testing.assert_allclose(got, synthetic.true_cosine(), atol=0.1)


def test_the_standard_error_covers_the_truth():
    """Over 60 repetitions, |error| < 2 s.e. in about 95 % of the pairs."""
    covered = []
    for seed in range(60):
        got = conflict.corrected_cosine(*simulated(60, seed=seed, noise=15.0))
        error = np.abs(got.cosine - synthetic.true_cosine()).values[ABOVE]
        covered.append(error < 2 * got.standard_error.values[ABOVE])
    assert 0.91 < np.mean(covered) < 0.98


def test_without_signal_the_corrected_cosine_is_undefined():
    got = conflict.corrected_cosine(*pure_noise(100))
    assert got.cosine.isnull().mean() > 0.8
    assert got.cosine.isnull().equals(got.standard_error.isnull())
    one_step = conflict.corrected_cosine(*simulated(1))
    assert one_step.cosine.isnull().all()


def test_conflict_rate_of_noise_is_a_half_and_of_known_groups_their_share():
    noise = conflict.conflict_rate(conflict.task_gramian(*pure_noise(400)))
    assert abs(noise.rate - 0.5) < 3 * noise.standard_error
    assert 0.8 < float(noise.by_step.std() / noise.null_error) < 1.25
    clean = conflict.conflict_rate(conflict.task_gramian(*simulated(50, noise=0.01)))
    assert float(clean.rate) == pytest.approx(16 / 28)  # 4 x 4 pairs between the groups, of 28
    buried = conflict.conflict_rate(conflict.task_gramian(*simulated(50, noise=4000.0)))
    assert abs(buried.rate - 0.5) < 0.1


def test_significant_pairs_keep_their_false_discovery_rate():
    found = [
        conflict.significant_pairs(conflict.task_gramian(*pure_noise(50, seed))).values.any() for seed in range(40)
    ]
    assert np.mean(found) < 0.15
    strong = conflict.significant_pairs(conflict.task_gramian(*simulated(100))).values
    assert strong[ABOVE].all()
    np.testing.assert_array_equal(strong, strong.T)
    assert not np.diag(strong).any()


def test_noise_scale_recovers_trace_over_squared_norm():
    got = conflict.noise_scale(*simulated(400, noise=40.0))
    np.testing.assert_allclose(got, 40.0, rtol=0.15)


def test_one_half_is_refused():
    gramian, count = simulated(4)
    with pytest.raises(ValueError, match="at least two halves"):
        conflict.corrected_cosine(gramian.isel(half=[0], other_half=[0]), count.isel(half=[0]))
