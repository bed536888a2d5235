"""Who arrives when, how many times as fast, and where on the noise axis: with what the seeds leave open."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import Formatter, PercentFormatter, StrMethodFormatter

from analysis.arrivals import arrival_axis
from analysis.methods import method_name, ordered
from analysis.plots.curves import AXIS_LABELS, label_axis
from analysis.plots.style import axes_or_new, draw_legend, gap_between, label_intervals, method_colour

_DODGE = 0.16
_ROOM = 1.5
"""How far intervals are followed beyond the estimates, in units of their largest distance from no effect."""
_TOP_LABELS = 5
_GREY = "#4d4d4d"


def plot_arrival_profile(
    profile: pd.DataFrame, *, reference: str | None = None, title: str = "", ax: Axes | None = None
) -> Axes:
    """Draws the fraction of each method's runs that have arrived, with its interval; a cross is a run that ended first.

    Args:
        profile: `arrivals.arrival_profile`.
        reference: The method whose own losses are the thresholds, which is drawn dashed and without interval.
        title: Of the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    axis = arrival_axis(profile)
    end = float(profile[axis].max())
    methods = ordered(profile["method"])
    alpha = 0.36 / max(3, len(methods) - 1)  # many bands on top of each other stay a band
    for method in methods:
        own, colour = profile[profile["method"] == method], method_colour(method)
        if own["fraction"].iloc[-1] == 1:  # of runs that have all arrived it is known how it goes on
            own = pd.concat([own, own.tail(1).assign(**{axis: end}, ended=0)])
        style = "--" if method == reference else "-"
        ax.step(
            own[axis], own["fraction"], where="post", color=colour, linewidth=2, linestyle=style,
            label=method_name(method),
        )  # fmt: skip
        if method != reference:
            ax.fill_between(own[axis], own["low"], own["high"], step="post", color=colour, alpha=alpha, linewidth=0)
        ended = own[own["ended"] > 0]
        ax.scatter(ended[axis], ended["fraction"], marker="x", s=40, color=colour, zorder=4, clip_on=False)
    ax.set(xlim=(0, 1.03 * end), ylim=(-0.02, 1.02))
    ax.set(ylabel="fraction of runs arrived", title=title)
    label_axis(ax, axis)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    _finish(ax)
    return ax


def plot_speed_up(speed: pd.DataFrame, *, reference: str = "baseline", title: str = "", ax: Axes | None = None) -> Axes:
    """Draws the speed-up to each threshold, with its interval; triangles are bounds where runs did not arrive.

    Args:
        speed: `speedup.speed_up_curve` of one or several methods, one below the other.
        reference: The method that they are compared with.
        title: Of the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    axis = arrival_axis(speed)
    ax.axhline(1, color=_GREY, linewidth=1)
    for method in ordered(speed["method"]):
        own, colour = speed[speed["method"] == method], method_colour(method)
        ax.plot(own[axis], own["estimate"], "o-", color=colour, markersize=3, linewidth=1.6, label=method_name(method))
        ax.fill_between(own[axis], own["low"], own["high"], color=colour, alpha=0.15, linewidth=0)
        _draw_bounds(own[axis], own, colour, ax)
    _limit(ax, speed, 1.0)
    name = method_name(reference)
    ax.set(ylabel="times as fast", title=title, xlabel=f"{AXIS_LABELS[axis]} after which {name} has the loss")
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
    shown = speed.drop_duplicates(axis).sort_values(axis)
    shown = shown.iloc[np.linspace(0, len(shown) - 1, min(_TOP_LABELS, len(shown))).round().astype(int)]
    top = ax.secondary_xaxis("top")
    top.set_xticks(shown[axis], [f"{value:.3g}" for value in shown["threshold"]], fontsize=7)
    top.set_xlabel(f"loss of {name}", fontsize=8)
    top.tick_params(length=2)
    top.spines["top"].set_visible(False)
    _finish(ax)
    return ax


def plot_interval_effects(
    effects: pd.DataFrame,
    tasks: xr.Dataset,
    *,
    neutral: float = 0.0,
    ylabel: str = "",
    title: str = "",
    formatter: Formatter | None = None,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws one quantity of every timestep interval with its interval; a star is one that is significant.

    Bounds are triangles, hollow circles the median that runs that did arrive determine, a cross at the foot nothing.

    Args:
        effects: Rows of one quantity of `interval_convergence.interval_convergence`.
        tasks: A run, for the coordinates of its intervals.
        neutral: The value of no effect, drawn as a line.
        ylabel: What is drawn.
        title: Of the panel.
        formatter: Of the value axis.
        limits: Of the value axis; else as far as the estimates need, so that a bar may leave the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    ax.axhline(neutral, color=_GREY, linewidth=1)
    methods = ordered(effects["method"])
    if limits is None:
        _limit(ax, effects, neutral)
    else:
        ax.set_ylim(limits)
    for index, method in enumerate(methods):
        own, colour = effects[effects["method"] == method], method_colour(method)
        at = own["task"] + (index - (len(methods) - 1) / 2) * gap_between(len(methods), _DODGE)
        error = (own["estimate"] - own["low"]).fillna(0), (own["high"] - own["estimate"]).fillna(0)
        ax.errorbar(
            at, own["estimate"], yerr=error, fmt="o", color=colour, markersize=4, elinewidth=1.2,
            label=method_name(method),
        )  # fmt: skip
        _draw_bounds(at, own, colour, ax)
        found = own["significant"]
        ax.scatter(
            at[found], np.full(found.sum(), 0.97), marker="*", s=34, color=colour, transform=ax.get_xaxis_transform()
        )
    label_intervals(ax, tasks, "x")
    ax.set(xlim=(-0.6, tasks.sizes["task"] - 0.4), ylabel=ylabel, title=title)
    if formatter is not None:
        ax.yaxis.set_major_formatter(formatter)
    _finish(ax)
    return ax


def _draw_bounds(at: pd.Series, rows: pd.DataFrame, colour: str, ax: Axes) -> None:
    """What is known of rows without an estimate: a bound from above or below, the median, or nothing."""
    open_ended = rows["estimate"].isna()
    above = open_ended & np.isfinite(rows["at_most"])
    below = open_ended & np.isfinite(rows["at_least"]) & (rows["at_least"] > 0)
    median = open_ended & rows["median"].notna()
    for chosen, name, marker in ((above, "at_most", "v"), (below, "at_least", "^"), (median, "median", "o")):
        ax.scatter(at[chosen], rows[name][chosen], marker=marker, s=26, facecolors="white", edgecolors=colour, zorder=3)
    nothing = open_ended & ~above & ~below & ~median
    heights = np.full(nothing.sum(), 0.02)
    ax.scatter(at[nothing], heights, marker="x", s=22, color=colour, transform=ax.get_xaxis_transform())


def _limit(ax: Axes, rows: pd.DataFrame, neutral: float) -> None:
    """Limits that hold all estimates and bounds, and intervals as far as they are not many times longer."""
    bounds = rows[["at_least", "at_most"]].replace(0, np.nan)  # a speed-up of at least 0 is no bound
    values = np.append(pd.concat([rows[["estimate", "median"]], bounds], axis=1).to_numpy(dtype=float), neutral)
    values = values[np.isfinite(values)]
    ends = np.append(rows[["low", "high"]].to_numpy(dtype=float), values)
    room = _ROOM * (np.abs(values - neutral).max() or 1.0)
    low, high = max(np.nanmin(ends), values.min() - room), min(np.nanmax(ends), values.max() + room)
    ax.set_ylim(low - 0.08 * (high - low), high + 0.15 * (high - low))


def _finish(ax: Axes) -> None:
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    draw_legend(ax)
    sns.despine(ax=ax)
