"""The plots of affinities and clusters show what they are given, on the scale asked for, undefined as undefined."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure

from analysis.agreement import AGREEMENT_COLUMNS
from analysis.gramians import task_coordinates
from analysis.plots.affinity import plot_affinity, plot_affinity_film, plot_agreement
from analysis.plots.clusters import plot_cluster_bars, plot_cluster_count, plot_clusters, plot_silhouette
from analysis.plots.style import DIVERGING, SEQUENTIAL

mpl.use("Agg")
K = 4
SNR = np.linspace(5, -5, 100)


@pytest.fixture
def ax():
    return Figure().subplots()


def in_form(values, directed=False):
    matrix = xr.DataArray(np.asarray(values, float), dims=("task", "other_task"), attrs={"directed": directed})
    return matrix.assign_coords(task_coordinates([0, 10, 30, 60, 100], SNR).coords)


def hatched(ax):
    return sorted((patch.get_y() + 0.5, patch.get_x() + 0.5) for patch in ax.patches if patch.get_hatch())


def grey(ax):
    return [patch for patch in ax.patches if patch.get_zorder() == 3]


def dots(ax):
    """Rows and columns of the cells with a dot."""
    found = [at for each in ax.collections for at in np.asarray(each.get_offsets()).tolist()]
    return sorted((round(row), round(column)) for column, row in found)


SIGNED = np.array([[1, 0.5, -0.2, np.nan], [0.5, 1, 0.4, 0], [-0.2, 0.4, 1, 0.1], [np.nan, 0, 0.1, 1]])


def test_a_signed_affinity_is_centred_and_one_of_shares_begins_at_zero(ax):
    marked = xr.DataArray(np.abs(SIGNED) > 0.3, dims=("task", "other_task"))
    assert plot_affinity(in_form(SIGNED), significant=marked, limit=0.8, ax=ax) is ax
    image = ax.images[0]
    np.testing.assert_array_equal(image.get_array().filled(np.nan), SIGNED)
    assert (image.get_clim(), image.get_cmap().name) == ((-0.8, 0.8), DIVERGING)
    assert hatched(ax) == [(0, 3), (3, 0)]
    assert len(grey(ax)) == K
    assert dots(ax) == [(row, column) for row, column in np.argwhere(np.abs(SIGNED) > 0.3).tolist()]
    positive = plot_affinity(in_form(np.abs(SIGNED) / 2), ax=Figure().subplots())
    assert (positive.images[0].get_clim(), positive.images[0].get_cmap().name) == ((0, 0.5), SEQUENTIAL)
    assert grey(positive) == []  # a diagonal that is not 1 is a value like others
    forced = plot_affinity(in_form(np.abs(SIGNED)), signed=True, ax=Figure().subplots())
    assert forced.images[0].get_clim() == (-1, 1)
    empty = plot_affinity(in_form(np.full((K, K), np.nan)), ax=Figure().subplots())
    assert len(hatched(empty)) == K * K


def test_a_directed_affinity_says_which_way(ax):
    plot_affinity(in_form(SIGNED, directed=True), ax=ax)
    assert ax.get_ylabel().startswith("trained on")
    assert ax.get_xlabel().startswith("affected")


def test_a_film_shows_every_window_in_its_place(ax):
    frames = np.stack([SIGNED, np.where(SIGNED == 1, 1, -SIGNED), np.where(SIGNED == 1, 1, 0.5 * SIGNED)])
    film = xr.concat([in_form(frame) for frame in frames], "window").assign_coords(
        first_step=("window", [10, 1010, 2010]), last_step=("window", [1000, 2000, 2010])
    )
    marked = film.copy(data=np.zeros(film.shape, dtype=bool))
    marked[1, 0, 2] = marked[2, 3, 0] = True  # the second of them is undefined
    assert plot_affinity_film(film, significant=marked, limit=0.6, title="x", ax=ax) is ax
    shown = ax.images[0].get_array().filled(np.nan)
    for window, frame in enumerate(frames):
        np.testing.assert_array_equal(shown[:, window * 5 : window * 5 + 4], frame)
    assert np.isnan(shown[:, [4, 9]]).all()
    assert ax.images[0].get_clim() == (-0.6, 0.6)
    assert hatched(ax) == sorted((row, column + 5 * w) for w in range(3) for row, column in ((0, 3), (3, 0)))
    assert len(grey(ax)) == 3 * K
    assert dots(ax) == [(0, 7)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["10-1,000", "1,010-2,000", "2,010"]
    assert ax.get_xticks().tolist() == [1.5, 6.5, 11.5]
    assert [label.get_text() for label in ax.child_axes[0].get_yticklabels()] == [
        f"{value:.1f}" for value in film["log_snr"].values
    ]
    positive = plot_affinity_film(film, signed=False, ax=Figure().subplots())
    assert positive.images[0].get_clim() == (0, 1)


def agreement(rows):
    return pd.DataFrame(rows, columns=AGREEMENT_COLUMNS)


def test_agreement_is_plain_above_and_partial_below(ax):
    names = ["first", "second", "pairs", "correlation", "partial", "significant", "partial_significant"]
    rows = [
        ["a", "b", 6, 0.9, 0.2, True, False],
        ["a", "c", 6, -0.3, np.nan, False, False],
        ["b", "c", 6, 0.5, -0.8, False, True],
    ]
    table = agreement([dict(zip(names, row, strict=True)) for row in rows])
    plot_agreement(table, names=["b", "a", "none", "c"], ax=ax)
    shown = ax.images[0].get_array().filled(np.nan)
    nan = np.nan
    expected = [[nan, 0.2, nan, 0.5], [0.9, nan, nan, -0.3], [nan] * 4, [-0.8, nan, nan, nan]]
    np.testing.assert_array_equal(shown, expected)
    assert dots(ax) == [(1, 0), (3, 0)]
    assert {(0, 2), (3, 1)} < set(hatched(ax))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a", "none", "c"]
    own = plot_agreement(table, ax=Figure().subplots())
    np.testing.assert_array_equal(own.images[0].get_array().filled(np.nan)[0], [nan, 0.9, -0.3])


def test_clusters_are_framed(ax):
    plot_clusters(in_form(SIGNED), np.array([0, 1, 1, 1]), limit=1, ax=ax)
    frames = [patch for patch in ax.patches if not patch.get_fill()]
    assert [(frame.get_xy(), frame.get_width(), frame.get_height()) for frame in frames] == [
        ((-0.5, -0.5), 1, 1),
        ((0.5, 0.5), 3, 3),
    ]


def test_bars_divide_the_timesteps(ax):
    plot_cluster_bars({"one": (0, 30, 100), "other": (0, 10, 60, 100)}, SNR, ax=ax)
    bars = [(bar.get_x(), bar.get_width(), round(bar.get_y() + bar.get_height() / 2)) for bar in ax.patches]
    assert bars == [(0, 30, 0), (30, 70, 0), (0, 10, 1), (10, 50, 1), (60, 40, 1)]
    assert [text.get_text() for text in ax.texts] == ["30", "10", "60"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "other"]
    top = ax.child_axes[0]
    assert [label.get_text() for label in top.get_xticklabels()][:2] == ["5.0", f"{SNR[12]:.1f}"]
    assert "-0.0" not in [label.get_text() for label in top.get_xticklabels()]


def scores(values, error=np.nan):
    index = pd.Index(range(2, 2 + len(values)), name="num_clusters")
    return pd.DataFrame({"value": values, "standard_error": error}, index)


def test_a_ring_marks_the_number_that_is_chosen(ax):
    found = {"a": scores([0.3, 0.6, 0.1], 0.05), "b": scores([0.2, 0.1, 0.0])}
    plot_cluster_count(found, best={"a": 3, "b": None}, ylabel="y", ax=ax)
    rings = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert [(ring.get_xdata()[0], ring.get_ydata()[0]) for ring in rings] == [(3, 0.6)]
    lines = [line for line in ax.lines if line not in rings]
    assert [line.get_label() for line in lines] == ["a", "b"]
    np.testing.assert_array_equal(lines[0].get_ydata(), [0.3, 0.6, 0.1])
    bars = ax.collections[0].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[0.25, 0.35], [0.55, 0.65], [0.05, 0.15]])


def test_silhouettes_stand_beside_the_bound_and_a_line_without_groups(ax):
    even = pd.Series([0.5, 0.4, 0.2], index=[2, 3, 4])
    plot_silhouette({"a": scores([0.3, 0.6, 0.1])}, best={"a": 3}, bound=0.25, even=even, colours={"a": "red"}, ax=ax)
    bound, line = ax.lines[:2]
    assert list(bound.get_ydata()) == [0.25, 0.25]
    np.testing.assert_array_equal(line.get_ydata(), even)
    assert line.get_linestyle() == "--"
    assert ax.lines[2].get_color() == "red"
    assert len(ax.get_legend().get_texts()) == 3
