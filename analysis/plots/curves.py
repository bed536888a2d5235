"""Curves over training: every seed as a thin line while they are few, their mean as a thick one, a band around it."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import EngFormatter

from analysis.methods import method_name, ordered
from analysis.plots.style import axes_or_new, draw_legend, method_colour, scale_losses

AXIS_LABELS = {
    "step": "optimizer steps",
    "samples": "samples seen",
    "seconds": "time in training steps (s)",
    "flops": "floating-point operations",
}
BAND_LABELS = {"range": "range of seeds", "bootstrap": "bootstrap of the mean"}


def plot_curves(
    curves: pd.DataFrame,
    *,
    mean: pd.DataFrame | None = None,
    bands: pd.DataFrame | None = None,
    title: str = "",
    ylabel: str = "validation loss",
    is_loss: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws one metric of all runs.

    Args:
        curves: `convergence.aligned_curves` or `smoothed_curves`: index an axis, columns (method, seed).
        mean: `convergence.mean_curves`: index an axis, columns method. Without it and bands only seeds are drawn.
        bands: `convergence.curve_bands`, drawn around the mean, which they hold, too. Where they are bootstrap
            intervals, the seeds are left out.
        title: Of the panel.
        ylabel: What is drawn.
        is_loss: Whether to choose the scale of the value axis as for losses.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    axis = str(curves.index.name)
    kinds = {} if bands is None else dict(zip(bands["method"], bands["band"], strict=True))
    for method in ordered(curves.columns.get_level_values("method")):
        colour = method_colour(method)
        line = pd.Series(dtype=float) if mean is None else mean[method].dropna()
        if bands is not None:
            own = bands[bands["method"] == method].set_index(axis, drop=False)
            line = own["mean"] if mean is None else line
            ax.fill_between(own[axis], own["low"], own["high"], color=colour, alpha=0.18, linewidth=0)
        if kinds.get(method) != "bootstrap":
            _draw_seeds(curves, method, colour, ax)
        ax.plot(line.index, line, color=colour, linewidth=2.2, label=method_name(method))
    if is_loss:
        scale_losses(ax)
    label_axis(ax, axis)
    ax.set(ylabel=ylabel, title=title)
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    draw_legend(ax)
    legend = ax.get_legend()
    if kinds and legend is not None:
        words = ", ".join(BAND_LABELS[kind] for kind in dict.fromkeys(kinds.values()))
        legend.set_title(f"band: {words}", prop=FontProperties(size=7))
    sns.despine(ax=ax)
    return ax


def label_axis(ax: Axes, axis: str) -> None:
    """Names a cost axis, with ticks such as 20M where the numbers are large."""
    ax.set_xlabel(AXIS_LABELS.get(axis, AXIS_LABELS["step"]))
    if axis in ("samples", "flops"):
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_seeds(curves: pd.DataFrame, method: str, colour: str, ax: Axes) -> None:
    for _, curve in curves[method].items():
        curve = curve.dropna()
        ax.plot(curve.index, curve, color=colour, linewidth=0.8, alpha=0.45, marker="." if len(curve) < 3 else "")


def plot_conflict_rate(
    curves: pd.DataFrame,
    *,
    mean: pd.DataFrame | None = None,
    null: float = 0.5,
    null_error: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the conflict rate over steps, with the band in which single probes of pure noise would lie.

    Args:
        curves: `convergence.aligned_curves` of ``conflict/rate``.
        mean: `convergence.mean_curves` of them.
        null: Rate that pure noise gives.
        null_error: Its standard deviation for one probe; the band is two of them wide on either side.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    if null_error is not None:
        band = (null - 2 * null_error, null + 2 * null_error)
        ax.axhspan(*band, color="#e8e8e8", zorder=0, label="pure noise, ± 2 s.d. of one probe")
    ax.axhline(null, color="#8c8c8c", linewidth=1, linestyle="--", zorder=1)
    plot_curves(curves, mean=mean, ylabel="share of pairs with cos < 0", is_loss=False, ax=ax)
    ax.set_ylim(0, 1)
    return ax
