"""Unbiased products, squared norms and traces of single probes, against vectors."""

import numpy as np
import pytest
import xarray as xr

from analysis import moments
from tests.analysis.simulation import GRAM, NORMS, TRACES, simulated

DIMS = ("gradient_step", "task", "half", "other_task", "other_half")
K, HALVES = 5, 2


def exact():
    """One probe's gradients (K, HALVES, 9), its Gramian and counts."""
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((K, HALVES, 9))
    count = rng.integers(1, 9, (K, HALVES))
    gramian = xr.DataArray(np.einsum("khp,lgp->khlg", gradients, gradients)[None], dims=DIMS)
    return gradients, gramian, xr.DataArray(count[None], dims=DIMS[:3])


def test_products_are_those_of_count_weighted_means():
    gradients, gramian, count = exact()
    mean = (gradients * count.values[0, ..., None]).sum(1) / count.values[0].sum(1)[:, None]
    got = moments.probe_moments(gramian, count).isel(gradient_step=0)
    np.testing.assert_allclose(got["product"], mean @ mean.T, rtol=1e-12)
    np.testing.assert_allclose(got["squared_norm"], (gradients[:, 0] * gradients[:, 1]).sum(-1), rtol=1e-12)
    n = count.values[0]
    harmonic = n[:, 0] * n[:, 1] / n.sum(1)  # between two means: n1 n2 / (n1 + n2) |difference|²
    difference = gradients[:, 0] - gradients[:, 1]
    np.testing.assert_allclose(got["trace"], harmonic * (difference**2).sum(-1), rtol=1e-12)
    unbiased = moments.unbiased_gramian(got)
    np.testing.assert_allclose(np.diag(unbiased), got["squared_norm"])
    np.testing.assert_allclose(unbiased.values[0, 1:], got["product"].values[0, 1:])


def test_norms_and_traces_are_unbiased_where_the_plain_norm_is_not():
    data = simulated(60, 100)
    means = moments.probe_moments(data.gramian, data.group_count).mean(("gradient_step", "layer"))
    np.testing.assert_allclose(means["squared_norm"], NORMS**2, rtol=0.06)
    np.testing.assert_allclose(means["trace"], TRACES, rtol=0.03)
    np.testing.assert_allclose(moments.unbiased_gramian(means), GRAM, atol=0.06)
    assert (moments.diagonal(means["product"]).values > 1.5 * NORMS**2).all()


@pytest.mark.parametrize("filling", [0.0, np.nan])
def test_an_empty_half_is_ignored_and_an_empty_task_is_unknown(filling):
    gradients, gramian, count = exact()
    count[0, 2, 1] = 0
    gramian[0, 2, 1] = gramian[0, :, :, 2, 1] = filling
    got = moments.probe_moments(gramian, count).isel(gradient_step=0)
    assert float(got["product"][2, 2]) == pytest.approx((gradients[2, 0] ** 2).sum())
    assert got["squared_norm"].isnull().values.tolist() == [False, False, True, False, False]
    assert got["trace"].isnull().values.tolist() == [False, False, True, False, False]
    count[0, 2] = 0
    got = moments.probe_moments(gramian, count).isel(gradient_step=0)
    unknown = got["product"].isnull().values
    assert unknown[2].all()
    assert unknown[:, 2].all()
    assert unknown.sum() == 2 * K - 1


def test_dimensions_may_come_in_any_order_and_single_precision():
    data = simulated(3, 2)
    turned = data.gramian.transpose("other_half", "layer", "task", "gradient_step", "half", "other_task")
    expected = moments.probe_moments(data.gramian, data.group_count)
    got = moments.probe_moments(turned, data.group_count.transpose())
    xr.testing.assert_allclose(got, expected)
    assert list(got["product"].coords["interval"].values) == list(data.interval.values)
    single = moments.probe_moments(data.gramian.astype(np.float32), data.group_count)
    assert single["product"].dtype == np.float64


def test_counts_of_other_probes_are_refused():
    data = simulated(3, 1)
    with pytest.raises(ValueError, match="3 probes, but sample counts of 2"):
        moments.task_gramian(data.gramian, data.group_count[:2])
