"""The figure about multi-task optimisation: what weights the tasks get while training."""

from __future__ import annotations

from typing import Literal

import xarray as xr

from analysis.grouping import group_by_method
from analysis.methods import method_name
from analysis.plots.task_weights import plot_task_weights
from analysis.report.panels import ReportFigure, Runs, keep_outer_labels, panels

_COLUMNS = 3
_MOST_PANELS = 12


def task_weights_figure(runs: Runs) -> ReportFigure | None:
    """Weights of the tasks by each balancing method, mean over seeds; None where none was used."""
    by_method = {method: own for method, own in group_by_method(runs).items() if any("task_weight" in r for r in own)}
    shown = dict(list(by_method.items())[:_MOST_PANELS])
    if not shown:
        return None
    rows = -(-len(shown) // _COLUMNS)
    figure, axes = panels(rows, min(_COLUMNS, len(shown)), height=2.9)
    flat = axes.flatten()
    for ax, (method, own) in zip(flat, shown.items(), strict=False):
        mean = _mean([run["task_weight"] for run in own if "task_weight" in run])
        plot_task_weights(mean, title=method_name(method), ax=ax)
    for ax in flat[len(shown) :]:
        figure.delaxes(ax)
    keep_outer_labels(axes)
    handles, labels = flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="timesteps", loc="outside right center", fontsize="small", frameon=False)
    left_out = (
        f" The first {_MOST_PANELS} of {len(by_method)} methods are shown." if len(by_method) > len(shown) else ""
    )
    return ReportFigure(
        "task_weights",
        "Weights of the timestep intervals",
        "What each multi-task method multiplies the intervals' losses by, averaged over the steps between two points "
        "and over seeds; 1 (dashed) is plain training, and the mean of all need not be 1. Look which noise levels a "
        "method favours, whether that settles, and whether weights merely follow the size of the losses, as those of "
        f"uncertainty weighting must.{left_out}",
        figure,
    )


def _mean(weights: list[xr.DataArray]) -> xr.DataArray:
    """Mean over runs, at the steps that all have; where there are none, of those that have the step."""
    steps = set.intersection(*(set(run["weight_step"].values.tolist()) for run in weights))
    join: Literal["inner", "outer"] = "inner" if steps else "outer"
    return xr.concat(weights, "run", join=join, coords="minimal", compat="override").mean("run", keep_attrs=True)
