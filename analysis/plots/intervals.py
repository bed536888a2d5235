"""Loss per timestep interval: level by method, and change against the baseline."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from analysis.methods import method_name, ordered
from analysis.plots.style import axes_or_new, draw_legend, label_intervals, method_colour, scale_losses


def plot_interval_loss(losses: pd.DataFrame, tasks: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Draws the final validation loss of every interval, one line per run.

    Args:
        losses: `frames.interval_losses`: columns method, seed, task, value.
        tasks: A run, for the coordinates of its intervals.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    for method in ordered(losses["method"]):
        own = losses[losses["method"] == method]
        for index, (_, run) in enumerate(own.groupby("seed")):
            label = method_name(method) if index == 0 else None
            ax.plot(run["task"], run["value"], color=method_colour(method), marker=".", linewidth=1, label=label)
    scale_losses(ax)
    ax.set_ylabel("final validation loss")
    _finish(ax, tasks)
    return ax


def plot_interval_change(losses: pd.DataFrame, tasks: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Draws each interval's loss relative to the baseline with the same seed: a dot per seed, a bar for their mean.

    Args:
        losses: `frames.interval_changes`: columns method, seed, task, change, mean.
        tasks: A run, for the coordinates of its intervals.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    methods = ordered(losses["method"])
    width = 0.8 / max(len(methods), 1)
    for index, method in enumerate(methods):
        own = losses[losses["method"] == method]
        at = own["task"] + (index - (len(methods) - 1) / 2) * width
        colour = method_colour(method)
        mean = own.drop_duplicates("task")
        ax.bar(at[mean.index], mean["mean"], width=0.9 * width, color=colour, alpha=0.35)
        ax.scatter(at, own["change"], s=14, color=colour, label=method_name(method), zorder=3)
    ax.axhline(0, color="#4d4d4d", linewidth=1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    ax.set_ylabel("loss relative to the baseline")
    _finish(ax, tasks)
    return ax


def _finish(ax: Axes, tasks: xr.Dataset) -> None:
    label_intervals(ax, tasks, "x")
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    draw_legend(ax)
    sns.despine(ax=ax)
