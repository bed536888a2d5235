"""Which task uses which channel: maps of tasks by channels, and one value for every task."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage

from analysis.methods import method_name, ordered
from analysis.plots.style import SEQUENTIAL, axes_or_new, draw_legend, label_intervals, method_colour

_LOW, _HIGH = 1e-2, 1e1
_OUTLINE = "#d55e00"


def plot_channel_usage(
    energy: xr.DataArray,
    *,
    allowed: xr.DataArray | None = None,
    title: str = "",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws the energy of every channel while each task is processed; white cells carry none.

    Args:
        energy: (task, channel) mean square relative to the mean over channels (1 is average). Colours are logarithmic,
            from a hundredth to ten times the average.
        allowed: (task, channel) booleans: the region that the mask leaves open is outlined.
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
    if allowed is not None:
        inside = allowed.transpose("task", "channel").isel(channel=slice(shown.sizes["channel"])).values
        ax.add_collection(LineCollection(_outline(inside), colors=_OUTLINE, linewidths=1.2))
    _finish_map(ax, shown, image, "energy / mean" if colorbar else "", title)
    return ax


def plot_mask_use(use: xr.DataArray, *, title: str = "", colorbar: bool = True, ax: Axes | None = None) -> Axes:
    """Draws how often the masks let each task use each channel: black always, white never.

    Args:
        use: (task, channel) shares of timesteps, one block of `routing_budget.mask_use`.
        title: Of the panel.
        colorbar: Whether to draw the scale.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    shown = use.transpose("task", "channel").dropna("channel", how="all")
    image = ax.imshow(shown.values, aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    _finish_map(ax, shown, image, "share of timesteps" if colorbar else "", title)
    return ax


def plot_channel_frequency(
    used: xr.DataArray, allowed: xr.DataArray, *, colour: str = "#0072b2", title: str = "", ax: Axes | None = None
) -> Axes:
    """Draws at which share of all timesteps each channel is used, a line for each block, and allowed, in grey below.

    Args:
        used: (block, channel) of `routing_budget.channel_frequency`.
        allowed: Likewise, of the masks; blocks with the same mask are one line.
        colour: Of the lines of use.
        title: Of the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    different = list({row.tobytes(): row for row in allowed.values}.values())
    lines = ((different, "#c4c4c4", 4.0, 1.0), (used.values, colour, 1.0, 0.6))
    for rows, line_colour, width, alpha in lines:
        for row in rows:
            ax.plot(row, color=line_colour, linewidth=width, alpha=alpha, drawstyle="steps-mid")
    ax.set(ylim=(0, 1.05), xlabel="channel", ylabel="share of all timesteps", title=title)
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    sns.despine(ax=ax)
    return ax


def plot_task_shares(
    shares: xr.DataArray,
    *,
    mean: xr.DataArray,
    top: float | None = None,
    reference: float | None = None,
    ylabel: str = "",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draws a share of every task: every run as a thin line, the mean of each method as a thick one.

    Args:
        shares: (run, task) with the coordinate ``method`` on ``run``.
        mean: (method, task).
        top: Upper end of the value axis, which starts at 0; without it as the values need.
        reference: A level to compare with, drawn as a dashed line.
        ylabel: What is drawn.
        title: Of the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    if reference is not None:
        ax.axhline(reference, color="#8c8c8c", linewidth=1, linestyle="--", zorder=0)
    for method, line in zip(shares["method"].values, shares.transpose("run", "task").values, strict=True):
        ax.plot(line, color=method_colour(str(method)), linewidth=0.8, alpha=0.45)
    for method in ordered(str(name) for name in mean["method"].values):
        colour = method_colour(method)
        ax.plot(mean.sel({"method": method}), color=colour, linewidth=2.2, marker=".", label=method_name(method))
    ax.set(ylabel=ylabel, title=title)
    ax.set_ylim(0, top)
    label_intervals(ax, shares, "x")
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    draw_legend(ax)
    sns.despine(ax=ax)
    return ax


def _finish_map(ax: Axes, shown: xr.DataArray, image: AxesImage, scale: str, title: str) -> None:
    """Names the axes; draws a colour bar if its ``scale`` has a name."""
    label_intervals(ax, shown, "y")
    ax.set(xlabel="channel", title=title)
    sns.despine(ax=ax, left=True, bottom=True)
    if scale:
        bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
        bar.set_label(scale, fontsize=8)


def _outline(inside: npt.NDArray[np.bool_]) -> list[list[tuple[float, float]]]:
    """Line segments between the cells (row, column) that are inside and those that are not."""
    sideways = np.argwhere(inside[:, 1:] != inside[:, :-1])
    downwards = np.argwhere(inside[1:] != inside[:-1])
    upright = [[(column + 0.5, row - 0.5), (column + 0.5, row + 0.5)] for row, column in sideways]
    return upright + [[(column - 0.5, row + 0.5), (column + 0.5, row + 0.5)] for row, column in downwards]
