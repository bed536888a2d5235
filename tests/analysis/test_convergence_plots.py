"""The plots about convergence show what they are given: bands, censoring, bounds, and what is significant."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from analysis import convergence
from analysis.interval_convergence import interval_convergence
from analysis.plots.convergence import plot_arrival_profile, plot_interval_effects, plot_speed_up
from analysis.plots.curves import plot_curves
from tests.analysis.tidy import tidy

mpl.use("Agg")
NAN = np.nan


@pytest.fixture
def ax():
    return Figure().subplots()


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def markers(ax):
    """Positions of scattered points by the form of their marker, which its vertices tell."""
    found = {}
    for dots in ax.collections:
        if isinstance(dots, PathCollection) and len(dots.get_offsets()):
            path = dots.get_paths()[0]
            form = {4: "triangle", 26: "circle", 11: "star"}[len(path.vertices)]
            if (path.codes == path.MOVETO).sum() == 2:
                form = "cross"
            elif form == "triangle":
                form = "up" if path.vertices[0, 1] > path.vertices[1, 1] else "down"
            found.setdefault(form, []).extend(dots.get_offsets().tolist())
    return found


def test_bands_surround_the_mean_and_few_seeds_are_drawn(ax):
    few = {f"dtr_{seed}": [4.0 + seed, 3 + seed, 2 + seed] for seed in range(3)}
    many = {f"baseline_{seed}": [14.0 + seed, 13 + seed, 12 + seed] for seed in range(10)}
    aligned = convergence.aligned_curves(tidy(**few, **many), "loss/val")
    bands = convergence.curve_bands(aligned)
    plot_curves(aligned, mean=convergence.mean_curves(aligned), bands=bands, is_loss=False, ax=ax)
    thin = [line for line in ax.lines if line.get_linewidth() < 1]
    assert len(thin) == 3  # those of the few
    drawn = [area.get_paths()[0].get_extents() for area in ax.collections]
    for area, method in zip(drawn, ("baseline", "dtr"), strict=True):
        own = bands[bands["method"] == method]
        assert (area.y0, area.y1) == pytest.approx((own["low"].min(), own["high"].max()))
    assert ax.get_legend().get_title().get_text() == "band: bootstrap of the mean, range of seeds"
    assert legend(ax) == ["Baseline", "DTR"]
    alone = plot_curves(aligned, bands=bands, is_loss=False, ax=Figure().subplots())
    for line, other in zip(alone.lines, ax.lines, strict=True):  # bands hold their mean
        np.testing.assert_allclose(line.get_xydata(), other.get_xydata())


@pytest.mark.parametrize(
    ("axis", "label"), [("step", "optimizer steps"), ("seconds", "time in training steps (s)"), ("flops", "operations")]
)
def test_curves_name_their_axis(ax, axis, label):
    frame = tidy(dtr_0=[4, 3, 2, 1]).assign(seconds=[1.0, 2, 3, 4], flops=[1e9, 2e9, 3e9, 4e9])
    aligned = convergence.aligned_curves(frame, "loss/val", axis)
    plot_curves(aligned, ax=ax)
    assert label in ax.get_xlabel()
    ax.figure.canvas.draw()
    ticks = [tick.get_text() for tick in ax.get_xticklabels()]
    assert any(text.endswith("G") for text in ticks) == (axis == "flops")


def test_arrival_profile_shows_arrivals_intervals_and_who_ended_first(ax):
    table = pd.DataFrame(
        {
            "method": ["baseline"] * 2 + ["dtr"] * 3,
            "seed": [0, 1, 0, 1, 2],
            "seconds": [80.0, 100, 40, 60, 100],
            "arrived": [True, True, True, False, True],
        }
    )
    profile = convergence.arrival_profile(table)
    plot_arrival_profile(profile, reference="baseline", ax=ax)
    baseline, dtr = ax.lines
    assert (baseline.get_linestyle(), dtr.get_linestyle()) == ("--", "-")
    assert baseline.get_xydata().tolist() == [[0, 0], [80, 0.5], [100, 1], [100, 1]]
    np.testing.assert_allclose(dtr.get_xydata(), [[0, 0], [40, 1 / 3], [60, 1 / 3], [100, 1], [100, 1]])
    assert markers(ax)["cross"] == [[60, pytest.approx(1 / 3)]]
    bands = [area for area in ax.collections if not isinstance(area, PathCollection)]
    assert len(bands) == 1  # the reference arrives by construction
    own = profile[profile["method"] == "dtr"]
    extents = bands[0].get_paths()[0].get_extents()
    assert (extents.y0, extents.y1) == pytest.approx((own["low"].min(), own["high"].max()))
    assert ax.get_xlabel() == "time in training steps (s)"
    assert legend(ax) == ["Baseline", "DTR"]


SPEED = pd.DataFrame(
    {
        "method": "dtr",
        "step": [100.0, 200, 300, 400],
        "threshold": [4.0, 3, 2, 1],
        "estimate": [2.0, 1.5, NAN, NAN],
        "low": [1.0, 1.2, NAN, NAN],
        "high": [4.0, 1.9, NAN, NAN],
        "at_least": [2.0, 1.5, 0, 0.7],
        "at_most": [2.0, 1.5, 1.3, np.inf],
        "median": [2.0, 1.5, 1.25, NAN],
    }
)


def test_speed_up_shows_bounds_where_there_is_no_estimate(ax):
    plot_speed_up(SPEED, ax=ax)
    line = next(line for line in ax.lines if line.get_label() == "DTR")
    np.testing.assert_array_equal(line.get_xydata(), SPEED[["step", "estimate"]])
    assert markers(ax) == {"down": [[300, 1.3]], "up": [[400, 0.7]], "circle": [[300, 1.25]]}
    low, high = ax.get_ylim()
    assert low < 0.7
    assert 3.5 < high < 4.5  # an interval is followed, but not without end
    top = ax.child_axes[0]
    assert [tick.get_text() for tick in top.get_xticklabels()] == ["4", "3", "2", "1"]
    assert "after which Baseline has the loss" in ax.get_xlabel()


def test_interval_effects_mark_what_is_significant_and_what_is_unknown(runs, ax):
    tasks = runs[0].isel(task=slice(4))
    effects = pd.DataFrame(
        {
            "method": "dtr",
            "task": range(4),
            "estimate": [0.1, -0.2, NAN, NAN],
            "low": [-0.1, -0.3, NAN, NAN],
            "high": [0.3, -0.1, NAN, NAN],
            "at_least": [0.1, -0.2, 0, 0],
            "at_most": [0.1, -0.2, 0.15, np.inf],
            "median": [NAN] * 4,
            "significant": [False, True, False, False],
        }
    )
    both = pd.concat([effects.assign(method="random", significant=False), effects])
    plot_interval_effects(both, tasks, ylabel="effect", ax=ax)
    found = markers(ax)
    dodge = 0.08  # of the second of two methods
    assert found["star"] == [[1 + dodge, pytest.approx(0.97)]]
    assert found["down"] == [[2 - dodge, 0.15], [2 + dodge, 0.15]]
    assert found["cross"] == [[3 - dodge, 0.02], [3 + dodge, 0.02]]
    series = [container for container in ax.containers if container.has_yerr]
    ends = [segment[:, 1].tolist() for segment in series[1].lines[2][0].get_segments() if len(segment)]
    assert ends[:2] == [pytest.approx([-0.1, 0.3]), pytest.approx([-0.3, -0.1])]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["000-024", "025-049", "050-074", "075-099"]
    assert legend(ax) == ["Random routing", "DTR"]


def test_effects_of_real_tables_stay_inside_their_axes(runs, ax):
    from analysis.frames import curves_frame

    table = interval_convergence(curves_frame(runs))
    rows = table[table["quantity"] == "difference"]
    plot_interval_effects(rows, runs[0], ax=ax)
    low, high = ax.get_ylim()
    assert (rows["estimate"] > low).all()
    assert (rows["estimate"] < high).all()
