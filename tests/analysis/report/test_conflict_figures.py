"""The report's figures about gradients draw the statistics that they name, of the runs that they name."""

import numpy as np
import pytest

from analysis import conflict, noise, significance, update
from analysis.gramians import pool_runs
from analysis.jackknife import half_width
from analysis.report.conflict_figures import blocks_figure, noise_figure, raw_vs_corrected_figure, update_figure

METHODS = ("baseline", "random", "dtr")


def of(runs, method):
    return [run for run in runs if run.attrs["method"] == method]


def drawn(ax):
    """Values and half the lengths of the vertical bars of each series with error bars."""
    found = []
    for container in ax.containers:
        if getattr(container, "has_yerr", False):
            ends = [segment[:, 1] for segment in container.lines[2][-1].get_segments() if len(segment)]
            found.append((container.lines[0].get_ydata(), np.array([np.ptp(pair) / 2 for pair in ends])))
    return found


def assert_shows(ax, expected):
    """That an axis shows these (values, half widths), method by method; undefined ones without a bar."""
    shown = drawn(ax)
    assert len(shown) == len(expected)
    for (values, bars), (value, width) in zip(shown, expected, strict=True):
        np.testing.assert_allclose(values, value)
        np.testing.assert_allclose(bars, width.values[np.isfinite(value)], rtol=1e-6)


@pytest.fixture(scope="module")
def pools(runs):
    return [pool_runs(of(runs, method)) for method in METHODS]


def test_raw_vs_corrected_is_of_one_run_of_each_method(runs):
    axes = raw_vs_corrected_figure(runs).figure.axes
    assert len(axes) == 3
    for ax, method in zip(axes, METHODS, strict=True):
        gramian, count = pool_runs(of(runs, method)[:1])
        plain, corrected = conflict.plain_cosine(gramian, count), conflict.corrected_cosine(gramian, count)
        above = np.triu_indices(gramian.sizes["task"], 1)
        known = np.isfinite(corrected.cosine.values[above])
        points = ax.containers[0].lines[0]
        np.testing.assert_allclose(points.get_xdata(), corrected.cosine.values[above][known])
        np.testing.assert_allclose(points.get_ydata(), plain.cosine.values[above][known])
        bars = [np.ptp(ends[:, 0]) / 2 for ends in ax.containers[0].lines[2][0].get_segments()]
        np.testing.assert_allclose(bars, half_width(corrected).values[above][known])
        assert ax.texts[0].get_text() == f"undefined: {(~known).sum()} of {known.size}"
        assert "seed 0, 10 probes" in ax.get_title()


def test_update_figure_shows_shares_and_the_rest(runs, pools):
    axes = update_figure(runs).figure.axes
    weights = update.loss_weights(runs[0])
    shares = [update.update_share(*pool, weights=weights) for pool in pools]
    assert_shows(axes[0], [(found["share"], half_width(found)) for found in shares])
    rest = [update.rest_cosine(*pool, weights=weights) for pool in pools]
    assert_shows(axes[1], [(found["cosine"], half_width(found)) for found in rest])


def test_noise_figure_shows_intervals_and_the_whole_batch(runs, pools):
    axes = noise_figure(runs).figure.axes
    scales = [noise.noise_scale(*pool) for pool in pools]
    assert_shows(axes[0], [(found["noise_scale"], half_width(found)) for found in scales])
    line = next(patch for patch in axes[0].patches if "training batch" in patch.get_label())
    np.testing.assert_allclose(line.get_data().values, 64 / 8)
    equal = update.loss_weights(runs[0])
    whole = [noise.batch_noise_scale(*pool, shares=equal, weights=equal) for pool in pools]
    np.testing.assert_allclose([values[0] for values, _ in drawn(axes[1])], [found["noise_scale"] for found in whole])
    line = next(patch for patch in axes[1].patches if "training batch" in patch.get_label())
    np.testing.assert_allclose(line.get_data().values, 64)


def test_blocks_figure_shows_rates_and_their_null(runs):
    axes = blocks_figure(runs).figure.axes
    pools = [pool_runs(of(runs, method), "block") for method in METHODS]
    rates = [significance.conflict_rate(*pool) for pool in pools]
    assert_shows(axes[0], [(found["rate"], half_width(found)) for found in rates])
    assert [tick.get_text() for tick in axes[0].get_xticklabels()] == [
        "x_embedder",
        "blocks.0",
        "blocks.1",
        "final_layer",
    ]
    band = axes[0].patches[0]
    probes = pools[0][0].sizes["gradient_step"]
    assert band.get_height() / 4 == pytest.approx(0.5 / np.sqrt(28) / np.sqrt(probes))
    rest = update.rest_cosine(*pools[0], weights=update.loss_weights(runs[0]))["cosine"]
    np.testing.assert_allclose(axes[1].images[0].get_array().filled(np.nan), rest.transpose("block", "task"))


def test_runs_of_different_blocks_have_no_figure_by_block(runs):
    smaller = runs[0].isel(layer=[0, 1, 2, 4])
    assert blocks_figure([smaller, *runs[1:]]) is None
    assert update_figure([smaller, *runs[1:]]) is not None
