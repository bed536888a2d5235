"""What a gradient step did against what the gradients said that it would do."""

from __future__ import annotations

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.ticker import NullLocator

from analysis.plots.style import SEQUENTIAL, axes_or_new

_MAX_LABELS = 9
_DECADES = 3


def plot_look_ahead(
    measured: xr.DataArray,
    predicted: xr.DataArray,
    *,
    limits: tuple[float, float] | None = None,
    slope: str = "",
    title: str = "",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws every ordered pair of tasks: predicted to first order to the right, measured upwards, on one scale.

    The scale is linear around zero and logarithmic beyond, since losses of different tasks are moved by shares that
    differ by orders of magnitude. On the dashed diagonal the first order is all there is.

    Args:
        measured: (task, other_task) of `transfer.look_ahead_affinity`; bars are one standard error long.
        predicted: Likewise of `transfer.predicted_look_ahead`.
        limits: The least and the largest value to make room for, on both axes; those drawn without it. Use one for all
            panels of a figure.
        slope: What to write beside the diagonal.
        title: Of the panel.
        colorbar: Whether to draw which colour is which affected task.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    first, real = (values.transpose("task", "other_task").values for values in (predicted, measured))
    error = measured["standard_error"].transpose("task", "other_task").values
    low, high = (float(np.nanmin([first, real])), float(np.nanmax([first, real]))) if limits is None else limits
    tasks = measured.sizes["other_task"]
    norm = BoundaryNorm(np.arange(tasks + 1) - 0.5, 256)
    ax.errorbar(first.ravel(), real.ravel(), yerr=error.ravel(), fmt="none", ecolor="#a6a6a6", elinewidth=0.8, zorder=1)
    affected = np.broadcast_to(np.arange(tasks), real.shape)
    points = ax.scatter(first, real, c=affected, cmap=colormaps[SEQUENTIAL], norm=norm, s=16, zorder=2)
    ax.axhline(0, color="#d0d0d0", linewidth=0.8, zorder=0)
    ax.axvline(0, color="#d0d0d0", linewidth=0.8, zorder=0)
    _scale(ax, low, high)
    ax.set_title(title)
    ax.set_xlabel("predicted share of the loss saved")
    ax.set_ylabel("measured")
    if slope:
        ax.text(0.03, 0.97, slope, transform=ax.transAxes, fontsize=8, va="top")
    if colorbar:
        bar = ax.figure.colorbar(points, ax=ax, shrink=0.85, pad=0.02)
        at = np.arange(0, tasks, -(-tasks // _MAX_LABELS))
        bar.set_ticks(at.tolist(), labels=[str(measured["other_interval"].values[task]) for task in at])
        bar.ax.tick_params(labelsize=7, length=0)
        bar.set_label("affected interval", fontsize=8)
    sns.despine(ax=ax)
    return ax


def _scale(ax: Axes, low: float, high: float) -> None:
    """Both axes from the least to the largest value, linear up to a thousandth of the largest; their diagonal."""
    top = max(abs(low), abs(high)) or 1.0
    linear = top / 10**_DECADES
    edges = min(1.6 * low, -linear), max(1.6 * high, linear)
    ax.plot(edges, edges, "--", color="#4d4d4d", linewidth=1, zorder=0)
    decades = 10.0 ** np.arange(np.floor(np.log10(top)), np.log10(3 * linear), -1)
    ticks = [tick for tick in (*-decades, 0.0, *decades[::-1]) if edges[0] <= tick <= edges[1]]
    labels = ["0" if tick == 0 else f"{tick:.0e}".replace("e-0", "e-").replace("-", "−") for tick in ticks]
    for set_scale, axis in ((ax.set_xscale, ax.xaxis), (ax.set_yscale, ax.yaxis)):
        set_scale("symlog", linthresh=linear, linscale=0.5)
        axis.set_ticks(ticks, labels)
        axis.set_minor_locator(NullLocator())
    ax.tick_params(axis="x", rotation=90)
    ax.tick_params(labelsize=8)
    ax.set(xlim=edges, ylim=edges)
    ax.set_aspect("equal")
