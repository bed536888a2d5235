"""The report's figures about convergence draw the statistics that they name, of the runs that they name."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from analysis.frames import curves_frame
from analysis.report import convergence_figures as figures
from tests.analysis.synthetic import DTR_SPEED, K


def clocked(run, seconds_per_step):
    clock = run["val_step"].values
    return run.assign(training_seconds=("clock_step", clock * seconds_per_step)).assign_coords(clock_step=clock)


@pytest.fixture(scope="module")
def curves(runs):
    return curves_frame(runs)


@pytest.fixture(scope="module")
def timed(runs):
    """The same with clocks: a step of a routed model takes twice as long."""
    return curves_frame([clocked(run, 1.0 if run.attrs["method"] == "baseline" else 2.0) for run in runs])


def titles(figure):
    return [ax.get_title() for ax in figure.figure.axes]


def lines(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def test_curves_by_part_and_by_interval(curves):
    whole = figures.curves_figure(curves)
    assert len(whole.figure.axes) == 3
    assert [ax.get_legend() is not None for ax in whole.figure.axes] == [True, False, False]
    assert "range of the seeds" in whole.caption
    by_interval = figures.interval_curves_figure(curves)
    assert titles(by_interval) == [f"t = {25 * task:03d}-{25 * task + 24:03d}" for task in range(K)]
    own = curves[(curves["metric"] == "loss/val_t175-199") & (curves["method"] == "dtr")]
    mean = own.groupby("step")["value"].mean()
    np.testing.assert_allclose(lines(by_interval.figure.axes[-1])["DTR"].get_ydata(), mean)
    few = figures.interval_curves_figure(curves, shown_intervals=3)
    assert titles(few)[:3] == ["t = 000-024", "t = 100-124", "t = 175-199"]
    assert figures.interval_curves_figure(curves[curves["metric"] == "loss/val"]) is None


def test_cost_is_drawn_where_it_is_known_and_says_more_than_steps(curves, timed):
    assert figures.cost_figure(curves) is None  # no clock, and all runs pay the same for a step
    figure = figures.cost_figure(timed)
    assert titles(figure) == ["at equal training time"]
    drawn = lines(figure.figure.axes[0])
    assert drawn["DTR"].get_xdata()[0] == 200
    assert drawn["Baseline"].get_xdata()[-1] == 1000
    larger = curves.assign(samples=curves["samples"] * (1 + (curves["method"] == "dtr")))
    assert titles(figures.cost_figure(larger)) == ["at equal samples"]


def test_arrivals_at_both_thresholds(curves):
    figure = figures.arrivals_figure(curves)
    early, late = figure.figure.axes
    assert lines(early)["DTR"].get_ydata()[-1] == lines(late)["DTR"].get_ydata()[-1] == 1
    assert lines(late)["Random routing"].get_ydata()[-1] == 0
    assert lines(early)["Baseline"].get_xdata()[-1] <= 1000
    assert figures.arrivals_figure(curves[curves["method"] == "dtr"]) is None


def test_speed_up_holds_the_known_truth_in_steps_and_in_time(curves, timed):
    in_steps = lines(figures.speed_up_figure(curves).figure.axes[0])["DTR"].get_ydata()
    np.testing.assert_allclose(in_steps[3:], DTR_SPEED, rtol=0.08)  # exponentials, interpolated between validations
    figure = figures.speed_up_figure(timed)
    assert titles(figure) == ["in steps", "in training time"]
    in_time = lines(figure.figure.axes[1])["DTR"].get_ydata()
    np.testing.assert_allclose(in_time[3:], DTR_SPEED / 2, rtol=0.08)
    assert figures.speed_up_figure(curves[curves["method"] == "dtr"]) is None


def test_effects_by_interval(runs, curves):
    figure = figures.interval_effects_figure(runs, curves)
    difference, area, speed, probability = figure.figure.axes
    for ax, sign in ((difference, -1), (area, -1), (speed, 1), (probability, 1)):
        values = ax.containers[-1].lines[0].get_ydata()  # DTR
        neutral = ax.lines[0].get_ydata()[0]
        assert len(values) == K
        assert (np.sign(values - neutral) == sign).all()
    ratios = speed.containers[-1].lines[0].get_ydata().astype(float)
    np.testing.assert_allclose(ratios, DTR_SPEED, rtol=0.08)
    assert "With 3 seeds no probability can be significant: its sign test reaches p = 0.25 at best." in figure.caption
    assert [text.get_text() for text in figure.figure.legends[0].get_texts()] == ["Random routing", "DTR"]
    assert figures.interval_effects_figure(runs, curves[curves["seed"] == 0]) is None
    assert figures.interval_effects_figure(runs[:3], curves[curves["method"] == "baseline"]) is None


def test_final_losses_by_interval(runs):
    assert len(figures.intervals_figure(runs).figure.axes) == 2
    assert len(figures.intervals_figure(runs[:3]).figure.axes) == 1  # nothing to be relative to


def test_no_figure_is_left_open(curves):
    before = plt.get_fignums()
    assert figures.curves_figure(curves).png.startswith(b"\x89PNG")
    assert plt.get_fignums() == before
