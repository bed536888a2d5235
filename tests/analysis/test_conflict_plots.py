"""The plots about gradients show what they are given: every value, its bar, and what is undefined as undefined."""

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from analysis.gramians import task_coordinates
from analysis.methods import ROUTING_NAMES
from analysis.plots.attenuation import plot_raw_vs_corrected
from analysis.plots.blocks import plot_block_cosines, plot_block_rates
from analysis.plots.style import method_colour
from analysis.plots.tasks import plot_noise_scale, plot_task_values
from tests.analysis.simulation import ABOVE, COSINES, K

mpl.use("Agg")
METHODS = list(ROUTING_NAMES)[:2]


@pytest.fixture
def ax():
    return Figure().subplots()


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def matrices(values, width):
    data = {name: (("task", "other_task"), array) for name, array in (("cosine", values), ("half_width", width))}
    return xr.Dataset(data)


def of_methods(values, dim="task"):
    values = np.asarray(values, float)
    coords = task_coordinates([0, 10, 30, 60, 100], np.linspace(5, -5, 100)).coords if dim == "task" else {}
    data = {"value": (("method", dim), values), "half_width": (("method", dim), 0.1 * np.abs(values))}
    return xr.Dataset(data, coords={"method": METHODS, **coords})


def bars(ax):
    """Ends of all vertical error bars of an axis."""
    return [
        segment[:, 1]
        for container in ax.containers
        if hasattr(container, "has_yerr") and container.has_yerr
        for segment in container.lines[2][-1].get_segments()
        if len(segment)
    ]


def test_raw_vs_corrected_shows_pairs_bars_and_the_undefined(ax):
    corrected = COSINES.copy()
    corrected[0, 3] = corrected[3, 0] = np.nan
    raw = 0.5 * COSINES + 0.01
    plot_raw_vs_corrected(
        matrices(raw, np.full((K, K), 0.05)), matrices(corrected, np.full((K, K), 0.2)), attenuation=0.5, ax=ax
    )
    defined = np.isfinite(corrected[ABOVE])
    points = ax.containers[0].lines[0]
    np.testing.assert_allclose(points.get_xdata(), corrected[ABOVE][defined])
    np.testing.assert_allclose(points.get_ydata(), raw[ABOVE][defined])
    horizontal, vertical = (line.get_segments() for line in ax.containers[0].lines[2])
    np.testing.assert_allclose([abs(np.diff(segment[:, 0])[0]) for segment in horizontal], 0.4)
    np.testing.assert_allclose([abs(np.diff(segment[:, 1])[0]) for segment in vertical], 0.1)
    margin = next(dots for dots in ax.collections if isinstance(dots, PathCollection))
    x, y = margin.get_offsets()[0]
    assert x > 1  # outside the range of values
    assert y == pytest.approx(raw[0, 3])
    assert [text.get_text() for text in ax.texts] == ["undefined: 1 of 6"]
    dashed, median = (line for line in ax.lines if line.get_label() in ("no noise", "median attenuation: 0.50"))
    np.testing.assert_allclose(dashed.get_ydata(), dashed.get_xdata())
    np.testing.assert_allclose(median.get_ydata(), 0.5 * np.asarray(median.get_xdata()))
    assert max(ax.get_xticks()) <= 1.0  # no tick in the margin


def test_raw_vs_corrected_without_any_defined_pair(ax):
    unknown = np.full((K, K), np.nan)
    plot_raw_vs_corrected(matrices(COSINES, 0 * COSINES), matrices(unknown, unknown), attenuation=np.nan, ax=ax)
    assert [text.get_text() for text in ax.texts] == ["undefined: 6 of 6"]
    assert not any("median" in label for label in labels(ax))


def test_task_values_show_bars_raw_values_and_crosses(ax):
    values = of_methods([[0.1, 0.2, np.nan, 0.4], [0.4, 0.3, 0.2, -0.1]])
    raw = values["value"].fillna(0.05)
    plot_task_values(values, raw=raw, reference=0.25, reference_label="equal shares", ax=ax)
    drawn = [container.lines[0].get_ydata() for container in ax.containers]
    np.testing.assert_allclose(drawn, values["value"])
    known = values["value"].values[np.isfinite(values["value"])]
    np.testing.assert_allclose(bars(ax), np.stack([known - 0.1 * abs(known), known + 0.1 * abs(known)], 1))
    first = {f"{ROUTING_NAMES[METHODS[0]]}: undefined in 1 of 4", "equal shares"}
    assert first <= set(labels(ax))
    hollow = [line for line in ax.lines if str(line.get_label()).endswith(", raw")]
    np.testing.assert_allclose([line.get_ydata() for line in hollow], raw)
    crosses = next(dots for dots in ax.collections if isinstance(dots, PathCollection))
    assert np.asarray(crosses.get_offsets())[0][1] < 0.05  # at the foot of the axes, whatever the values
    assert ax.containers[0].lines[0].get_color() == method_colour(METHODS[0])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["00-09", "10-29", "30-59", "60-99"]


def test_noise_scale_is_logarithmic_with_the_training_batch(ax):
    samples = xr.DataArray([4.0, 8.0, 12.0, 16.0], dims="task")
    scales = of_methods([[1, 10, 100, 1000], [2, 20, np.nan, 2000]])
    plot_noise_scale(scales, samples, samples_label="batch", ax=ax)
    assert ax.get_yscale() == "log"
    low, high = ax.get_ylim()
    assert low < 1
    assert high > 2200
    stairs = next(patch for patch in ax.patches if patch.get_label() == "batch")
    np.testing.assert_allclose(stairs.get_data().values, samples)
    assert "batch" in labels(ax)


def test_the_whole_batch_has_one_place(ax):
    scales = of_methods([[30.0], [np.nan]], dim="place").rename(place="task")
    plot_noise_scale(scales, xr.DataArray([64.0], dims="task"), samples_label="training batch", ax=ax)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["whole batch"]
    low, high = ax.get_ylim()
    assert low < 30 < 64 < high


def test_noise_scales_that_are_all_undefined_still_make_a_figure(ax):
    plot_noise_scale(of_methods(np.full((2, 4), np.nan)), xr.DataArray([8.0] * 4, dims="task"), ax=ax)
    low, high = ax.get_ylim()
    assert 0 < low < 8 < high


def test_block_rates_show_their_null_and_what_is_significant(ax):
    rates = of_methods([[0.2, 0.5, 0.7], [0.1, 0.4, 0.6]], "block").assign_coords(block=["in", "mid", "out"])
    rates = rates.assign(conflicting=(("method", "block"), [[0.0, 0.1, 0.5], [0.0, 0.0, 0.3]]))
    plot_block_rates(rates, null_error=0.05, ax=ax)
    band = ax.patches[0]
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((0.4, 0.6))
    heights = [bar.get_height() for bar in ax.patches[1:]]
    np.testing.assert_allclose(heights, [0.0, 0.1, 0.5, 0.0, 0.0, 0.3])
    points = [box.lines[0].get_ydata() for box in ax.containers if hasattr(box, "has_yerr")]
    np.testing.assert_allclose(points, rates["value"])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["in", "mid", "out"]
    assert ax.get_ylim() == (0, 1)


def test_block_cosines_are_centred_and_hatched_where_undefined(ax):
    coords = {**task_coordinates([0, 10, 30, 60, 100]).coords, "block": ["in", "out"]}
    coords = {name: coord for name, coord in coords.items() if "other" not in name}
    cosine = xr.DataArray([[0.5, -0.2, np.nan, 0.1], [0.3, 0.2, 0.1, 0.0]], dims=("block", "task"), coords=coords)
    plot_block_cosines(cosine.transpose(), limit=0.6, ax=ax)
    assert ax.images[0].get_clim() == (-0.6, 0.6)
    red, _, blue, _ = ax.images[0].cmap(0.0)
    assert red > blue
    assert [patch.get_xy() for patch in ax.patches if patch.get_hatch()] == [(1.5, -0.5)]
    assert len(ax.texts) == 7
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["in", "out"]


def test_nothing_lies_on_the_edge_or_under_the_legend(ax):
    scales = of_methods([[1, 10, 100, 1000], [np.nan] * 4])
    scales["half_width"] = 0.9 * abs(scales["value"])
    plot_noise_scale(scales, xr.DataArray([4.0, 8.0, 12.0, 16.0], dims="task"), samples_label="batch", ax=ax)
    low, high = ax.get_ylim()
    left, right = ax.get_xlim()
    assert left < -0.6
    assert right > 3.6
    assert low < 0.1  # the lower end of the first bar
    ax.figure.draw_without_rendering()
    _, foot = ax.transData.inverted().transform(ax.get_legend().get_window_extent().p0)
    assert 1900 < foot < high
    # A method without a single value says so, and has no line to look for.
    assert labels(ax).count(ROUTING_NAMES[METHODS[1]]) == 0
    assert f"{ROUTING_NAMES[METHODS[1]]}: undefined in 4 of 4" in labels(ax)
