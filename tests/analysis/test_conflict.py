"""Cosines and what follows from them, on gradients with known means and covariances."""

import numpy as np
import pytest
import xarray as xr

from analysis import conflict
from analysis.jackknife import half_width
from analysis.moments import task_gramian
from tests.analysis.simulation import ABOVE, COSINES, GRAM, NORMS, K, simulated, true_gradients

SIMILARITY = 2 * np.outer(NORMS, NORMS) / (NORMS[:, None] ** 2 + NORMS**2)


@pytest.fixture(scope="module")
def many():
    """150 experiments of 80 probes."""
    data = simulated(80, 150)
    return data.gramian, data.group_count


def pairs(values):
    """(copies, pairs) of (layer, task, other_task)."""
    return values.transpose("layer", "task", "other_task").values[:, *ABOVE]


def coverage(found, name, truth):
    inside = np.abs(pairs(found[name]) - truth[ABOVE]) <= pairs(half_width(found))
    return inside[np.isfinite(pairs(found[name]))].mean()


def test_noise_hides_the_cosine_and_the_correction_finds_it(many):
    plain, corrected = conflict.plain_cosine(*many), conflict.corrected_cosine(*many)
    assert corrected.cosine.notnull().all()
    assert coverage(plain, "cosine", COSINES) < 0.35  # right only where the cosine is zero or small
    assert np.abs(pairs(plain.cosine).mean(0) - COSINES[ABOVE]).max() > 0.3
    np.testing.assert_allclose(pairs(corrected.cosine).mean(0), COSINES[ABOVE], atol=0.02)
    assert 0.90 < coverage(corrected, "cosine", COSINES) < 0.99
    same = np.arange(K)
    assert (corrected.cosine.values[:, same, same] == 1).all()
    assert (corrected.standard_error.values[:, same, same] == 0).all()


def test_attenuation_is_what_noise_takes_from_the_plain_cosine(many):
    plain, corrected = conflict.plain_cosine(*many), conflict.corrected_cosine(*many)
    np.testing.assert_allclose(
        pairs(plain.cosine), pairs(corrected.attenuation) * pairs(corrected.cosine), rtol=1e-9, atol=1e-12
    )
    assert np.isnan(corrected.attenuation.values[:, 0, 0]).all()


def test_standard_errors_are_the_spread_over_experiments(many):
    for found, name in (
        (conflict.plain_cosine(*many), "cosine"),
        (conflict.corrected_cosine(*many), "cosine"),
        (conflict.magnitude_similarity(*many), "similarity"),
    ):
        spread = pairs(found[name]).std(0, ddof=1)
        np.testing.assert_allclose(pairs(found.standard_error).mean(0), spread, rtol=0.35)


def test_magnitude_similarity_is_free_of_noise(many):
    found = conflict.magnitude_similarity(*many)
    resolved = SIMILARITY[ABOVE] < 0.97  # at its maximum of 1 an estimate can only err downwards
    inside = np.abs(pairs(found.similarity) - SIMILARITY[ABOVE]) <= pairs(half_width(found))
    assert 0.90 < inside[:, resolved].mean() < 0.99
    norm = np.sqrt(np.einsum("slkk->lk", task_gramian(*many).values) / 80)
    naive = 2 * norm[:, :, None] * norm[:, None] / (norm[:, :, None] ** 2 + norm[:, None] ** 2)
    naive_error = np.abs(naive[:, *ABOVE].mean(0) - SIMILARITY[ABOVE])
    assert naive_error.max() > 0.05
    np.testing.assert_allclose(pairs(found.similarity).mean(0), SIMILARITY[ABOVE], atol=0.02)


def test_curvature_bound_is_that_of_the_true_gradients(many):
    gradients = true_gradients()
    projected = gradients[:, None] - (GRAM / NORMS**2)[..., None] * gradients  # g_k without its part along g_l
    surgery = projected + projected.swapaxes(0, 1)
    truth = (surgery**2).sum(-1) / ((gradients[:, None] + gradients) ** 2).sum(-1)
    found = conflict.curvature_bound(*many)
    resolved = (np.isfinite(pairs(found.bound)).mean(0) == 1) & (truth[ABOVE] < 2)
    assert resolved.sum() >= 4
    inside = np.abs(pairs(found.bound) - truth[ABOVE]) <= pairs(half_width(found))
    assert 0.88 < inside[:, resolved].mean() < 0.99
    products = task_gramian(*many).values.mean(0)
    own = np.einsum("lkk->lk", products)
    plus_minus = [own[:, :, None] + own[:, None] + sign * 2 * products for sign in (1, -1)]
    naive = (1 - products**2 / (own[:, :, None] * own[:, None])) * plus_minus[1] / plus_minus[0]
    assert np.abs(naive[:, *ABOVE].mean(0) - truth[ABOVE])[resolved].max() > 0.3
    assert np.isnan(found.bound.values[:, 0, 0]).all()


def test_a_pair_is_destructive_if_it_conflicts_more_than_its_norms_are_alike():
    """PCGrad's condition (a), cos <= -Φ: norms 1 and 4 have Φ = 8 / 17 = 0.47."""
    for cosine, expected in ((-0.7, True), (-0.3, False)):
        gram = np.array([[1.0, 4 * cosine], [4 * cosine, 16.0]])
        data = simulated(20, 2, means=true_gradients(gram), traces=np.array([0.1, 0.1]))
        found = conflict.curvature_bound(data.gramian, data.group_count).destructive.values
        assert (found[:, 0, 1] == expected).all()
        assert not found[:, [0, 1], [0, 1]].any()


def test_without_signal_the_corrected_cosine_is_undefined_not_zero():
    data = simulated(40, 60, means=np.zeros((K, 16)))
    got = conflict.corrected_cosine(data.gramian, data.group_count)
    # A norm passes by chance in about 2 % of the tasks, both of a pair in far fewer.
    assert np.isnan(pairs(got.cosine)).mean() > 0.98
    assert got.cosine.isnull().equals(got.standard_error.isnull())
    assert conflict.plain_cosine(data.gramian, data.group_count).cosine.notnull().all()
    one_probe = simulated(1, 2)
    assert conflict.corrected_cosine(one_probe.gramian, one_probe.group_count).cosine.isnull().all()


def test_one_task_within_noise_leaves_the_others_defined():
    means = true_gradients()
    means[2] = 0
    data = simulated(80, 20, means=means)
    defined = conflict.corrected_cosine(data.gramian, data.group_count).cosine.notnull().mean("layer").values
    others = np.ix_([0, 1, 3], [0, 1, 3])
    assert (defined[others] == 1).all()
    assert (defined[2] < 0.2).all()


def test_more_than_two_halves_give_the_same_answer():
    rng = np.random.default_rng(0)
    gradients = true_gradients()[:, None] + 0.5 * rng.standard_normal((200, K, 3, 16))
    dims = ("gradient_step", "task", "half", "other_task", "other_half")
    gramian = xr.DataArray(np.einsum("skhp,slgp->skhlg", gradients, gradients), dims=dims)
    count = xr.DataArray(np.full((200, K, 3), 4), dims=dims[:3])
    np.testing.assert_allclose(conflict.corrected_cosine(gramian, count).cosine, COSINES, atol=0.1)
    assert np.abs(conflict.plain_cosine(gramian, count).cosine - COSINES).max() > 0.15


def test_noiseless_gradients_need_no_correction():
    data = simulated(6, 1, traces=np.full(K, 1e-12))
    np.testing.assert_allclose(conflict.cosine(task_gramian(data.gramian, data.group_count))[0, 0], COSINES, atol=1e-4)
    np.testing.assert_allclose(task_gramian(data.gramian, data.group_count)[0, 0], GRAM, atol=1e-4)


def test_one_half_is_refused():
    data = simulated(4, 1)
    gramian, count = data.gramian.isel(half=[0], other_half=[0]), data.group_count.isel(half=[0])
    with pytest.raises(ValueError, match="at least two halves"):
        conflict.corrected_cosine(gramian, count)
    assert conflict.plain_cosine(gramian, count).cosine.notnull().all()
