"""One value per timestep interval and method, with error bars: shares, cosines, noise scales."""

from __future__ import annotations

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from analysis.methods import method_name, ordered
from analysis.plots.style import axes_or_new, draw_legend, gap_between, label_intervals, method_colour

_DODGE = 0.13
_DEEPEST = 30.0
"""A logarithmic axis follows bars down to this fraction of the smallest value."""
_LEGEND_COLUMNS = 2
_LEGEND_ROW = 0.075
"""Height of a row of the legend, as a share of an axis of four inches."""


def plot_task_values(
    values: xr.Dataset,
    *,
    raw: xr.DataArray | None = None,
    seeds: xr.DataArray | None = None,
    reference: float | None = None,
    reference_label: str = "",
    ylabel: str = "",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draws a value of every interval, one line per method. Undefined values are crosses at the bottom, never zeros.

    Args:
        values: ``value`` (method, task) and ``half_width``, the length of its bars, or their ends ``low`` and ``high``.
        raw: (method, task) the same without noise correction, drawn hollow and dashed.
        seeds: (method, seed, task) what single seeds gave, drawn as small dots; NaN where a method lacks a seed.
        reference: A level to compare with, drawn as a line.
        reference_label: What it is.
        ylabel: What is drawn.
        title: Of the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    ax.axhline(0, color="#4d4d4d", linewidth=0.8, zorder=0)
    if reference is not None:
        ax.axhline(reference, color="#8c8c8c", linewidth=1, linestyle="--", zorder=0, label=reference_label)
    _draw_methods(values, ax)
    if seeds is not None:
        for method, at in _places(values["value"]):
            dots = seeds.sel({"method": method}).transpose("seed", "task").values
            where = np.broadcast_to(at, dots.shape)
            ax.scatter(where, dots, s=9, color=method_colour(method), alpha=0.45, linewidths=0, zorder=3)
    if raw is not None:
        for method, at in _places(raw):
            colour = method_colour(method)
            label = f"{method_name(method)}, raw"
            ax.plot(
                at, raw.sel({"method": method}), "o:", color=colour, markerfacecolor="white", markersize=4, label=label
            )
    label_intervals(ax, values, "x")
    ax.set_xlim(*_sides(values.sizes["task"]))
    _finish(ax, ylabel, title)
    return ax


def plot_noise_scale(
    scales: xr.Dataset, samples: xr.DataArray, *, samples_label: str = "", title: str = "", ax: Axes | None = None
) -> Axes:
    """Draws noise scales on a logarithmic axis, with the samples that training uses as a line.

    Args:
        scales: ``value`` and ``half_width`` (method, task) in samples, NaN (a cross) where too large to be measured.
            One task without the coordinate ``interval`` stands for the whole batch.
        samples: (task) of each interval in a training batch.
        samples_label: What the line is.
        title: Of the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    edges = np.r_[np.arange(samples.size) - 0.5, samples.size - 0.5]
    ax.stairs(samples.values, edges, baseline=None, color="black", linewidth=1.4, label=samples_label)
    _draw_methods(scales, ax)
    if "interval" in scales.coords:
        label_intervals(ax, scales, "x")
    else:
        ax.set_xticks([0], ["whole batch"])
    ax.set_xlim(*_sides(samples.size))
    ax.set_yscale("log")
    ax.set_ylim(*_log_limits(scales, samples))
    _finish(ax, "noise scale (samples)", title)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    return ax


def _draw_methods(values: xr.Dataset, ax: Axes) -> None:
    for method, at in _places(values["value"]):
        own = values.sel({"method": method})
        value = own["value"].values
        ends = np.stack([value - own["low"].values, own["high"].values - value]) if "low" in own else own["half_width"]
        error = np.nan_to_num(np.asarray(ends))
        colour = method_colour(method)
        missing = ~np.isfinite(value)
        ax.errorbar(
            at, value, yerr=error, fmt="o-", color=colour, markersize=4, linewidth=1.2, elinewidth=0.9,
            label="_" if missing.all() else method_name(method),
        )  # fmt: skip
        if missing.any():
            label = f"{method_name(method)}: undefined in {missing.sum()} of {len(value)}"
            bottom = np.full(missing.sum(), 0.02)
            ax.scatter(
                at[missing], bottom, marker="x", s=22, color=colour, label=label, clip_on=False,
                transform=ax.get_xaxis_transform(),
            )  # fmt: skip


def _places(values: xr.DataArray) -> list[tuple[str, np.ndarray]]:
    """Methods in order, and where on the axis their values stand, side by side."""
    methods = ordered(str(name) for name in values["method"].values)
    shift = (np.arange(len(methods)) - (len(methods) - 1) / 2) * gap_between(len(methods), _DODGE)
    return [(method, np.arange(values.sizes["task"]) + by) for method, by in zip(methods, shift, strict=True)]


def _sides(tasks: int) -> tuple[float, float]:
    """Limits that leave the first and the last markers, and half a step of a line, off the edge."""
    return -0.7, tasks - 0.3


def _log_limits(scales: xr.Dataset, samples: xr.DataArray) -> tuple[float, float]:
    """Room for all values, lines and bars; bars whose lower end is zero or close to it run to the foot."""
    value, error = scales["value"].values, np.nan_to_num(scales["half_width"].values)
    shown = np.concatenate([value.ravel(), samples.values.ravel()])
    shown = shown[shown > 0]
    feet = (value - error)[value - error > shown.min() / _DEEPEST]
    # Crosses stand at the foot, hence the distance.
    low = min(float(shown.min()) / 3, float(feet.min(initial=np.inf)) / 1.5)
    return low, float(max(shown.max(), np.nan_to_num(value + error).max())) * 1.2


def _finish(ax: Axes, ylabel: str, title: str) -> None:
    """Names the axes, and draws the legend into room of its own above everything else."""
    ax.set(ylabel=ylabel, title=title)
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    rows = -(-len(ax.get_legend_handles_labels()[1]) // _LEGEND_COLUMNS)
    taken = min(0.05 + _LEGEND_ROW * rows, 0.6)
    to_axis = ax.yaxis.get_transform()
    low, high = to_axis.transform(np.array(ax.get_ylim()))
    top = to_axis.inverted().transform(np.array([low + (high - low) / (1 - taken)]))
    ax.set_ylim(top=float(top[0]))
    draw_legend(ax, "upper center", _LEGEND_COLUMNS)
    sns.despine(ax=ax)
