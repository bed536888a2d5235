"""Noise scales of gradients whose per-sample covariance is known."""

import numpy as np
import pytest
import xarray as xr

from analysis import noise
from analysis.jackknife import half_width
from analysis.moments import diagonal, probe_moments
from tests.analysis.simulation import (
    GRAM,
    HALVES,
    MEAN_COUNT,
    NORMS,
    TRACES,
    WIDTH,
    K,
    covered,
    simulated,
    spreads,
    true_gradients,
)

SCALES = TRACES / NORMS**2
SHARES = np.array([0.1, 0.2, 0.3, 0.4])
WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])


def by_task(values):
    return xr.DataArray(values, dims="task")


@pytest.fixture(scope="module")
def many():
    data = simulated(150, 150)
    return data.gramian, data.group_count


def test_noise_scale_is_trace_over_squared_norm_and_its_error_covers_it(many):
    found = noise.noise_scale(*many)
    assert 0.90 < covered(found, "noise_scale", SCALES, half_width(found)) < 0.99
    np.testing.assert_allclose(found.noise_scale.median("layer"), SCALES, rtol=0.06)


def test_the_naive_noise_scale_cannot_exceed_the_samples_it_was_measured_with(many):
    means = probe_moments(*many).mean("gradient_step")
    naive = means["trace"] / diagonal(means["product"])
    samples = 2 * MEAN_COUNT
    assert (naive.transpose("layer", "task") < 0.8 * SCALES).all()
    assert (naive < samples).all()
    assert SCALES.max() > samples
    found = noise.noise_scale(*many)
    assert (np.abs(found.noise_scale.mean("layer") / SCALES - 1) < 0.1).all()


def test_gradients_within_noise_have_no_noise_scale():
    data = simulated(40, 60, means=np.zeros((K, WIDTH)))
    found = noise.noise_scale(data.gramian, data.group_count)
    assert float(found.noise_scale.isnull().mean()) > 0.93
    assert found.noise_scale.isnull().equals(found.standard_error.isnull())


def batch_gradients(traces, stratified, batch=200, draws=4000):
    """Gradients (draws, WIDTH) of the weighted loss, estimated from batches of single samples."""
    rng = np.random.default_rng(3)
    means, scale = true_gradients(), spreads(traces)
    fixed = np.repeat(np.arange(K), (batch * SHARES).round().astype(int))
    task = np.broadcast_to(fixed, (draws, batch)) if stratified else rng.choice(K, size=(draws, batch), p=SHARES)
    factor = (WEIGHTS / SHARES)[task][..., None]
    total = np.zeros((draws, WIDTH))
    for at in range(batch):
        own = task[:, at]
        total += factor[:, at] * (means[own] + scale[own] * (rng.exponential(size=(draws, WIDTH)) - 1))
    return total / batch, batch


@pytest.mark.parametrize("stratified", [True, False])
def test_noise_scale_of_the_whole_batch_is_the_batch_where_noise_equals_signal(stratified):
    """Against the variance of gradients of whole batches, drawn both ways; little noise, so that the draw matters."""
    traces = TRACES / 20
    gradients, batch = batch_gradients(traces, stratified)
    signal = WEIGHTS @ GRAM @ WEIGHTS
    closed = (WEIGHTS**2 * traces / SHARES).sum() / signal
    if not stratified:
        closed += (WEIGHTS**2 * NORMS**2 / SHARES).sum() / signal - 1
    assert closed == pytest.approx(batch * gradients.var(0, ddof=1).sum() / signal, rel=0.03)
    data = simulated(80, 150, traces=traces)
    found = noise.batch_noise_scale(
        data.gramian, data.group_count, shares=by_task(SHARES), weights=by_task(WEIGHTS), stratified=stratified
    )
    assert float(found.noise_scale.median()) == pytest.approx(closed, rel=0.02)
    assert 0.90 < covered(found, "noise_scale", closed, half_width(found)) < 0.99


def test_suggested_batches_give_every_task_its_noise_scale():
    got = noise.suggested_batch(by_task(SCALES), by_task([0.5, 0.25, 0.25, 0.0]))
    np.testing.assert_allclose(got[:3], SCALES[:3] / [0.5, 0.25, 0.25])
    assert np.isnan(got[3])


def test_shares_are_those_of_the_samples():
    count = xr.DataArray(np.full((3, 2, HALVES), 4), dims=("gradient_step", "task", "half"))
    count[:, 1] = 12
    np.testing.assert_allclose(noise.sample_shares(count), [0.25, 0.75])
