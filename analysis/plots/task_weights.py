"""Weights that a multi-task method gives the tasks, over training."""

from __future__ import annotations

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes

from analysis.plots.style import axes_or_new

_SPREAD = 4.0
"""Ratio of the largest to the smallest weight from which on the axis is logarithmic."""
_FEW_POINTS = 3
"""With fewer points than this a line is short or none at all, so that its points are marked."""


def plot_task_weights(weights: xr.DataArray, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draws the weight of every task over steps, one line per task, from low noise (dark) to high (light).

    Args:
        weights: (weight_step, task) with coordinate ``interval``; 1 is plain training.
        title: Of the panel.
        ax: Where to draw. The axis is logarithmic where all weights are positive and differ by much.
    """
    ax = axes_or_new(ax)
    names = weights["interval"].values
    for task, colour in enumerate(sns.color_palette("viridis", weights.sizes["task"])):
        values = weights.isel(task=task).values
        marker = "o" if np.isfinite(values).sum() < _FEW_POINTS else ""
        style = {"color": colour, "linewidth": 1.2, "marker": marker, "markersize": 4}
        ax.plot(weights["weight_step"], values, label=str(names[task]), **style)
    ax.axhline(1.0, color="#4d4d4d", linewidth=0.8, linestyle="--")
    low, high = float(weights.min()), float(weights.max())
    if low > 0 and high / low > _SPREAD:
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="step", ylabel="weight (1: plain training)", title=title)
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    sns.despine(ax=ax)
    return ax
