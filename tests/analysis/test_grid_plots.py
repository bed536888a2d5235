import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure

from analysis import grid
from analysis.plots.grid import plot_grid, plot_grid_effects, routing_colour
from analysis.plots.style import method_colour
from tests.analysis.grids import OPTIMISATIONS, ROUTINGS, grid_of

mpl.use("Agg")


@pytest.fixture
def ax():
    return Figure().subplots()


def values():
    rng = np.random.default_rng(0)
    return {(r, o): list(rng.normal(size=3)) for r in ROUTINGS for o in OPTIMISATIONS}


def points(ax):
    """Offsets of every group of marks, by their size."""
    found = [marks for marks in ax.collections if isinstance(marks, PathCollection) and len(marks.get_offsets())]
    sizes = sorted({float(marks.get_sizes()[0]) for marks in found})
    return [[marks.get_offsets().data for marks in found if marks.get_sizes()[0] == size] for size in sizes]


def test_every_seed_and_every_mean_is_drawn_in_its_row(ax):
    known = values()
    frame = grid_of(known)
    assert plot_grid(grid.grid_cells(frame), frame, level=0.25, ax=ax) is ax
    seeds, means = points(ax)
    order = [(r, o) for o in OPTIMISATIONS for r in ROUTINGS]
    np.testing.assert_allclose([own[:, 0] for own in seeds], [known[cell] for cell in order])
    np.testing.assert_allclose([own[0, 0] for own in means], [np.mean(known[cell]) for cell in order])
    at = np.array([own[0, 1] for own in means]).reshape(3, 3)
    assert (np.diff(at.ravel()) > 0).all()
    np.testing.assert_array_equal(at.round(), np.arange(3)[:, None] * np.ones(3))  # each in the row of its optimisation
    spans = [lines.get_segments()[0] for lines in ax.collections if isinstance(lines, LineCollection)]
    cells = grid.grid_cells(frame)
    np.testing.assert_allclose([span[:, 0] for span in spans], cells[["low", "high"]])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["Uniform", "Min-SNR", "PCGrad"]
    assert ax.get_ylim() == (2.5, -0.5)  # the first on top
    assert ax.lines[0].get_xdata()[0] == 0.25
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["Plain", "Random routing", "DTR"]


def test_gaps_and_divergence_are_written_not_drawn_as_numbers(ax):
    known = values() | {("dtr", "pcgrad"): [1.0, np.nan, 2.0]}
    del known["random", "min_snr"]
    frame = grid_of(known)
    plot_grid(grid.grid_cells(frame), frame, ax=ax)
    said = [(text.get_text(), round(text.get_position()[1])) for text in ax.texts]
    assert said == [("missing", 1), ("diverged", 2)]
    assert len(points(ax)[1]) == 7


def test_effects_have_a_star_where_they_are_significant(ax):
    seeds = np.arange(5.0)
    wobble = 0.01 * np.array([1, -2, 1.5, -1, 0.5])
    known = {
        ("plain", "uniform"): seeds,
        ("plain", "p2"): seeds,
        ("dtr", "uniform"): seeds - 1 + wobble,
        ("dtr", "p2"): seeds + 30 * wobble,
    }
    frame = grid_of(known, ["plain", "dtr"], ["uniform", "p2"])
    by_seed = grid.seed_effects(frame)
    plot_grid_effects(grid.effect_intervals(by_seed), by_seed, "routing", ax=ax)
    dots, means, stars = points(ax)
    np.testing.assert_allclose([own[:, 0] for own in dots], [-1 + wobble, 30 * wobble])
    np.testing.assert_allclose([own[0, 0] for own in means], [-1 + wobble.mean(), 30 * wobble.mean()], atol=1e-12)
    assert [own[0].tolist() for own in stars] == [[0.985, 0.0]]  # with Uniform alone
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["Uniform", "P2"]


def test_only_the_effect_asked_for_is_drawn(ax):
    by_seed = grid.seed_effects(grid_of(values()))
    plot_grid_effects(grid.effect_intervals(by_seed), by_seed, "interaction", legend=False, ax=ax)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["Min-SNR", "PCGrad"]
    assert len(points(ax)[1]) == 4
    assert ax.get_legend() is None


def test_a_routing_has_the_colour_of_its_method():
    assert routing_colour("plain") == method_colour("baseline")
    assert routing_colour("dtr") == method_colour("dtr")
