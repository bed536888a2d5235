"""Curves over training steps: every seed as a thin line, the mean over seeds as a thick one."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from analysis.methods import method_name, ordered
from analysis.plots.style import axes_or_new, draw_legend, method_colour, scale_losses


def plot_curves(
    curves: pd.DataFrame,
    *,
    mean: pd.DataFrame | None = None,
    title: str = "",
    ylabel: str = "validation loss",
    is_loss: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws one metric of all runs.

    Args:
        curves: `convergence.aligned_curves`: index step, columns (method, seed).
        mean: `convergence.mean_curves`: index step, columns method. Without it only the seeds are drawn.
        title: Of the panel.
        ylabel: What is drawn.
        is_loss: Whether to choose the scale of the value axis as for losses.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    methods = ordered(curves.columns.get_level_values("method"))
    for method in methods:
        colour = method_colour(method)
        for _, curve in curves[method].items():
            curve = curve.dropna()
            ax.plot(curve.index, curve, color=colour, linewidth=0.8, alpha=0.45, marker="." if len(curve) < 3 else "")
        if mean is not None and mean[method].notna().any():
            line = mean[method].dropna()
            ax.plot(line.index, line, color=colour, linewidth=2.2, label=method_name(method))
        else:
            ax.plot([], [], color=colour, linewidth=2.2, label=method_name(method))
    if is_loss:
        scale_losses(ax)
    ax.set(xlabel="optimizer steps", ylabel=ylabel, title=title)
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    draw_legend(ax)
    sns.despine(ax=ax)
    return ax


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
