"""The figure of the tasks' weights: what it draws, and when there is one."""

import numpy as np
import pytest
import xarray as xr

from analysis.plots.task_weights import plot_task_weights
from analysis.report.task_weight_figures import task_weights_figure


def run(method, values, steps=(50, 100), seed=0):
    values = np.asarray(values, dtype=float)
    tasks = [f"t{k}" for k in range(values.shape[1])]
    return xr.Dataset(
        {"task_weight": (("weight_step", "task"), values)},
        coords={"weight_step": list(steps), "task": range(len(tasks)), "interval": ("task", tasks)},
        attrs={"method": method, "seed": seed},
    )


def test_a_line_per_task_and_a_logarithmic_axis_for_positive_weights():
    ax = plot_task_weights(run("baseline+uw", [[1, 2], [0.5, 4]])["task_weight"], title="UW")
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[1, 0.5], [2, 4]]
    assert ax.get_yscale() == "log"
    assert plot_task_weights(run("x", [[1, 2], [1, 1.5]])["task_weight"]).get_yscale() == "linear"
    assert ax.get_title() == "UW"
    assert plot_task_weights(run("x", [[1, -2], [0.5, 4]])["task_weight"]).get_yscale() == "linear"


@pytest.mark.parametrize(("points", "marked"), [(1, True), (2, True), (3, False)])
def test_few_points_are_marked_because_lines_do_not_show_them(points, marked):
    weights = run("x", [[1, 2]] * points, steps=range(points))["task_weight"]
    assert [line.get_marker() == "o" for line in plot_task_weights(weights).lines[:2]] == [marked] * 2


def test_a_panel_per_method_with_the_mean_over_the_steps_that_all_seeds_have():
    runs = [
        run("baseline+uw", [[1, 2], [3, 4]]),
        run("baseline+uw", [[3, 4], [9, 9]], steps=(50, 70), seed=1),
        run("dtr+upgrad", [[1, 1], [2, 2]]),
    ]
    figure = task_weights_figure(runs).figure
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["Baseline + UW", "DTR + UPGrad"]
    first, second = figure.axes[0].lines[:2]
    assert first.get_xdata().tolist() == [50]
    assert (first.get_ydata().tolist(), second.get_ydata().tolist()) == ([2], [3])


def test_seeds_without_a_common_step_are_drawn_at_all_of_their_steps():
    own = [run("x", [[1, 2]], steps=(50,)), run("x", [[3, 4]], steps=(70,), seed=1)]
    first, second = task_weights_figure(own).figure.axes[0].lines[:2]
    assert (first.get_xdata().tolist(), first.get_ydata().tolist()) == ([50, 70], [1, 3])
    assert second.get_ydata().tolist() == [2, 4]


def test_plain_training_has_no_such_figure():
    assert task_weights_figure([run("baseline", [[1, 1], [1, 1]]).drop_vars("task_weight")]) is None


@pytest.mark.parametrize("count", [1, 14])
def test_any_number_of_methods_is_drawn(count):
    made = task_weights_figure([run(f"baseline+m{k:02d}", [[1, 2], [3, 4]]) for k in range(count)])
    assert len(made.figure.axes) == min(count, 12)
    assert ("of 14" in made.caption) == (count == 14)
    assert made.png
