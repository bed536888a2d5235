"""What part of the channels: used and dead by block, effective by block and task, specialised, shared with whom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.methods import method_name, ordered
from analysis.plots.style import SEQUENTIAL, axes_or_new, draw_legend, label_intervals, method_colour, write_cells

_USAGE = {"used_share": "#0072b2", "silent_share": "#e69f00", "masked_share": "#d9d9d9"}
_USAGE_NAMES = {"used_share": "used", "silent_share": "allowed, silent", "masked_share": "masked off"}
_GROUPS = {"always": "#8c8c8c", "all_tasks": "#56b4e9", "some_tasks": "#0072b2", "own": "#d55e00"}
_GROUP_NAMES = {
    "always": "by all, always",
    "all_tasks": "by all, at some timesteps",
    "some_tasks": "by some intervals",
    "own": "by this interval alone",
}


def plot_usage_by_block(usage: xr.Dataset, *, title: str = "", legend: bool = True, ax: Axes | None = None) -> Axes:
    """Draws which part of each block's channels a task uses, and writes beside it how many no task uses.

    Args:
        usage: ``used_share``, ``silent_share``, ``masked_share`` (block), which sum to 1, and ``dead`` (block), as
            `activations.channel_usage` averaged over tasks.
        title: Of the panel.
        legend: Whether to name the colours.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    rows = np.arange(usage.sizes["block"])
    left = np.zeros(rows.size)
    for name, colour in _USAGE.items():
        width = usage[name].values
        ax.barh(rows, width, left=left, height=0.75, color=colour, label=_USAGE_NAMES[name])
        left = left + width
    for row, dead in enumerate(usage["dead"].values):
        ax.text(1.02, row, f"{dead:.0f}" if dead == round(dead) else f"{dead:.1f}", va="center", fontsize=8)
    ax.text(1.02, -0.75, "dead", fontsize=8, va="bottom")
    _name_rows(ax, usage["block"].values.tolist())
    ax.set(xlim=(0, 1), xlabel="share of channels")
    ax.set_title(title, loc="left")
    if legend:
        draw_legend(ax)
    sns.despine(ax=ax, left=True)
    return ax


def plot_block_task_shares(
    share: xr.DataArray,
    *,
    top: float = 1.0,
    label: str = "",
    title: str = "",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws a share of the channels for every block and task.

    Args:
        share: (block, task), such as ``effective_share`` of `activations.channel_usage`.
        top: Value at which colours saturate; use one for all panels of a figure.
        label: What is drawn, for the colour bar.
        title: Of the panel.
        colorbar: Whether to draw the scale.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    values = share.transpose("block", "task").values
    image = ax.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    write_cells(ax, image, values)
    label_intervals(ax, share, "x")
    _name_rows(ax, share["block"].values.tolist())
    ax.set_title(title)
    sns.despine(ax=ax, left=True, bottom=True)
    if colorbar:
        ax.figure.colorbar(image, ax=ax, pad=0.02).set_label(label, fontsize=8)
    return ax


def plot_specialisation(
    channels: pd.DataFrame, *, reference: pd.DataFrame, title: str = "", ax: Axes | None = None
) -> Axes:
    """Draws how specialised the channels of each block are: boxes of all channels, one colour per method.

    Args:
        channels: Columns method, block, specialisation, one row per channel.
        reference: Columns method, block, value: what noise alone gives, drawn as a vertical line through the box. NaN
            where it is not known.
        title: Of the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    methods = ordered(channels["method"])
    blocks = list(dict.fromkeys(channels["block"]))
    height = 0.8 / len(methods)
    places = {
        (method, block): row + (index - (len(methods) - 1) / 2) * height
        for row, block in enumerate(blocks)
        for index, method in enumerate(methods)
    }
    for (method, block), at in places.items():
        own = channels[(channels["method"] == method) & (channels["block"] == block)]
        ax.boxplot(
            own["specialisation"], positions=[at], widths=0.85 * height, orientation="horizontal", whis=(5, 95),
            showfliers=False, patch_artist=True, manage_ticks=False, boxprops={"facecolor": method_colour(method)},
            medianprops={"color": "white", "linewidth": 1.6},
        )  # fmt: skip
    for method, block, value in zip(*(reference[name] for name in ("method", "block", "value")), strict=True):
        at = places[method, block]
        ax.vlines(value, at - height / 2, at + height / 2, color="black", linewidth=1.6, zorder=5)
    handles: list[Artist] = [Patch(facecolor=method_colour(method), label=method_name(method)) for method in methods]
    handles.append(Line2D([], [], color="black", linewidth=1.6, label="noise alone"))
    ax.legend(handles=handles, fontsize=8, ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    # Small values are quadratic in the differences between intervals: the root gives them room in proportion.
    ax.set_xscale("function", functions=(lambda value: np.sqrt(np.maximum(value, 0)), np.square))
    ax.set_xticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], ["0", ".01", ".05", ".1", ".25", ".5", "1"])
    ax.set(xlim=(0, 1), xlabel="specialisation  (0: all intervals alike, 1: one alone)")
    _name_rows(ax, blocks)
    ax.set_title(title, pad=24)
    ax.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    sns.despine(ax=ax, left=True)
    return ax


def plot_routing_budget(
    share: xr.DataArray, *, allowed: xr.DataArray, title: str = "", legend: bool = True, ax: Axes | None = None
) -> Axes:
    """Draws the channels that a timestep of each task uses, by whom it shares them with, as stacked bars.

    Args:
        share: (task, group) of `routing_budget`'s ``per_timestep``, as a share of the channels that exist.
        allowed: (task) the share that the mask lets a timestep use, drawn as a line.
        title: Of the panel.
        legend: Whether to name the colours.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    tasks = np.arange(share.sizes["task"])
    bottom = np.zeros(tasks.size)
    for group, colour in _GROUPS.items():
        height = share.sel(group=group).values
        ax.bar(tasks, height, bottom=bottom, width=0.8, color=colour, label=_GROUP_NAMES[group])
        bottom = bottom + height
    ax.stairs(
        allowed.values, np.arange(tasks.size + 1) - 0.5, baseline=None, color="black", linewidth=1.4, label="allowed"
    )
    label_intervals(ax, share, "x")
    ax.set(ylim=(0, 1.05), ylabel="share of channels", title=title)
    if legend:
        draw_legend(ax)
    sns.despine(ax=ax)
    return ax


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Names the rows 0 ... N - 1 from the top; figures grow with the number of blocks."""
    ax.set_yticks(np.arange(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
