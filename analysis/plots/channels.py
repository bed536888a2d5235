"""Which task uses which channel."""

from __future__ import annotations

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from analysis.methods import method_name, ordered
from analysis.plots.style import SEQUENTIAL, axes_or_new, draw_legend, label_intervals, method_colour

_LOW, _HIGH = 1e-2, 1e1


def plot_channel_usage(energy: xr.DataArray, *, title: str = "", colorbar: bool = True, ax: Axes | None = None) -> Axes:
    """Draws the energy of every channel while each task is processed; white cells carry none.

    Args:
        energy: (task, channel) mean square relative to the mean over channels (1 is average). Colours are logarithmic,
            from a hundredth to ten times the average.
        title: Of the panel.
        colorbar: Whether to draw the scale.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    shown = energy.transpose("task", "channel").dropna("channel", how="all")
    positive = np.ma.masked_less_equal(np.nan_to_num(shown.values), 0.0)
    image = ax.imshow(
        positive, aspect="auto", cmap=SEQUENTIAL, norm=LogNorm(_LOW, _HIGH, clip=True), interpolation="nearest"
    )
    label_intervals(ax, shown, "y")
    ax.set(xlabel="channel", title=title)
    sns.despine(ax=ax, left=True, bottom=True)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
        bar.set_label("energy / mean", fontsize=8)
    return ax


def plot_effective_channels(share: xr.DataArray, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draws the effective number of channels of each task as a share of all, one line per method.

    Args:
        share: (method, task) in [0, 1].
        title: Of the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    for method in ordered(str(name) for name in share["method"].values):
        ax.plot(share.sel({"method": method}), color=method_colour(method), marker=".", label=method_name(method))
    ax.set(ylim=(0, 1), ylabel="effective share of channels", title=title)
    label_intervals(ax, share, "x")
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    draw_legend(ax)
    sns.despine(ax=ax)
    return ax
