import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from analysis import affinity, convergence, frames
from analysis.methods import OPTIMISATION_NAMES, ROUTING_NAMES
from analysis.plots.curves import plot_conflict_rate, plot_curves
from analysis.plots.intervals import plot_interval_change, plot_interval_loss
from analysis.plots.matrices import plot_conflict_matrix, plot_overlap
from analysis.plots.style import gap_between, method_colour
from tests.analysis.synthetic import K

mpl.use("Agg")


@pytest.fixture
def ax():
    return Figure().subplots()


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_conflict_matrix_is_centred_and_hatches_what_is_undefined(runs, ax):
    cosine = affinity.gradient_affinity(runs[0]).copy()
    cosine[2, 3] = cosine[3, 2] = np.nan
    marked = xr.ones_like(cosine, dtype=bool)
    assert plot_conflict_matrix(cosine, significant=marked, limit=0.9, ax=ax) is ax
    assert ax.images[0].get_clim() == (-0.9, 0.9)
    red, _, blue, _ = ax.images[0].cmap(0.0)
    assert red > blue  # conflict is red
    hatched = [patch.get_xy() for patch in ax.patches if patch.get_hatch()]
    assert sorted(hatched) == [(1.5, 2.5), (2.5, 1.5)]
    assert len(texts(ax)) == K * K - 2  # no number in an undefined cell
    assert len(ax.collections[0].get_offsets()) == K * K - 2  # and no mark of significance
    assert [tick.get_text() for tick in ax.get_xticklabels()][:2] == ["000-024", "025-049"]
    top = ax.child_axes[0]
    assert next(tick.get_text() for tick in top.get_xticklabels()) == f"{float(runs[0].log_snr[0]):.1f}"


def test_many_intervals_stay_legible(ax):
    size = 40
    coords = {
        "interval": ("task", [f"t{i:03d}-{i:03d}" for i in range(size)]),
        "log_snr": ("task", np.linspace(5, -5, size)),
    }
    plot_overlap(xr.DataArray(np.ones((size, size)), dims=("task", "other_task"), coords=coords), ax=ax)
    assert len(ax.get_xticks()) <= 16
    assert texts(ax) == []


def test_every_seed_is_drawn_and_the_mean_is_the_one_given(runs, ax):
    aligned = convergence.aligned_curves(frames.curves_frame(runs), frames.VAL_LOSS)
    mean = convergence.mean_curves(aligned)
    plot_curves(aligned, mean=mean, ax=ax)
    thick = [line for line in ax.lines if line.get_linewidth() > 2]
    thin = [line for line in ax.lines if line.get_linewidth() < 1]
    assert (len(thick), len(thin)) == (3, 9)
    assert [line.get_label() for line in thick] == ["Baseline", "Random routing", "DTR"]
    np.testing.assert_allclose(thick[2].get_ydata(), mean["dtr"])
    np.testing.assert_allclose(thin[0].get_ydata(), aligned["baseline", 0])


def test_mean_curves_end_where_the_first_seed_ends():
    columns = pd.MultiIndex.from_tuples([("dtr", 0), ("dtr", 1)], names=["method", "seed"])
    aligned = pd.DataFrame([[4.0, 2.0], [3.0, np.nan]], index=[1, 2], columns=columns)
    mean = convergence.mean_curves(aligned)["dtr"]
    assert mean.loc[1] == 3.0
    assert np.isnan(mean.loc[2])


def test_conflict_rate_shows_its_null_band(runs, ax):
    aligned = convergence.aligned_curves(frames.curves_frame(runs), frames.CONFLICT_RATE)
    plot_conflict_rate(aligned, null_error=0.1, ax=ax)
    low, high = ax.patches[0].get_y(), ax.patches[0].get_y() + ax.patches[0].get_height()
    assert (low, high) == pytest.approx((0.3, 0.7))
    assert ax.get_ylim() == (0, 1)


def test_interval_plots(runs, ax):
    losses = frames.interval_losses(runs)
    plot_interval_loss(losses, runs[0], ax=ax)
    assert len(ax.lines) == 9
    changes = frames.interval_changes(losses, "baseline")
    assert set(changes["method"]) == {"dtr", "random"}
    own = losses.set_index(["method", "seed", "task"])["value"]
    row = changes.iloc[5]
    expected = own[row.method, row.seed, row.task] / own["baseline", row.seed, row.task] - 1
    assert row.change == pytest.approx(expected)
    other = plot_interval_change(changes, runs[0], ax=Figure().subplots())
    assert sum(len(dots.get_offsets()) for dots in other.collections) == 2 * 3 * K
    assert len(other.patches) == 2 * K  # one bar per method and interval
    heights = [bar.get_height() for bar in other.patches[K:]]
    expected = changes[changes.method == "dtr"].groupby("task")["change"].mean()
    assert heights == pytest.approx(expected.tolist())


def test_plots_make_their_own_axes_when_given_none(runs):
    import matplotlib.pyplot as plt

    assert plot_overlap(affinity.mask_overlap(runs[-1])).figure is plt.gcf()
    plt.close("all")


def test_methods_have_colours_of_their_own():
    colours = {method_colour(method) for method in ROUTING_NAMES}
    assert len(colours) == len(ROUTING_NAMES)
    assert method_colour("other") not in colours


def test_a_grid_of_methods_has_as_many_colours():
    parts = ["", "+min_snr", "+p2", "+uw", "+pcgrad", "+nash_mtl", "+upgrad"]
    tags = [f"{routing}{part}" for routing in ("baseline", "random", "dtr") for part in parts]
    colours = np.array([to_rgb(method_colour(tag)) for tag in tags])
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1)[np.triu_indices(len(tags), 1)]
    assert distances.min() > 0.1
    everything = {method_colour(f"{routing}+{part}") for routing in ROUTING_NAMES for part in OPTIMISATION_NAMES}
    assert len(everything) > 60  # the hues start again after the fourteenth
    assert len({method_colour(f"dtr{variant}") for variant in ("", "+per_block", "+depth")}) == 3


def test_marks_of_many_methods_stay_at_their_place():
    assert gap_between(2, 0.16) == 0.16
    assert 21 * gap_between(21, 0.16) < 1
