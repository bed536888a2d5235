"""Clusters of timesteps: their bounds over an affinity and along t, and what speaks for their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from analysis.plots.affinity import plot_affinity
from analysis.plots.style import axes_or_new

_SHADES = ("#b5cfe3", "#5b8db8")
"""Neighbouring clusters in turn; which colour says nothing."""
_TICKS = 9


def plot_clusters(
    affinity: xr.DataArray,
    labels: npt.NDArray[np.integer],
    *,
    limit: float | None = None,
    signed: bool | None = None,
    title: str = "",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws an affinity between tasks with a frame around each cluster of tasks.

    Args:
        affinity: (task, other_task).
        labels: (K,) cluster of each task, as of `clustering.Clustering`.
        limit: As for `plots.affinity.plot_affinity`.
        signed: Likewise.
        title: Of the panel.
        colorbar: Whether to draw the scale.
        ax: Where to draw.
    """
    ax = plot_affinity(affinity, limit=limit, signed=signed, title=title, colorbar=colorbar, ax=ax)
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    for start, width in zip(starts, np.diff(starts, append=len(labels)), strict=True):
        corner = (start - 0.5, start - 0.5)
        ax.add_patch(
            Rectangle(corner, width, width, fill=False, edgecolor="black", linewidth=2, zorder=5, clip_on=False)
        )
    return ax


def plot_cluster_bars(
    bounds: Mapping[str, Sequence[int]],
    log_snr: Sequence[float] | npt.NDArray[np.floating],
    *,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draws how several partitions divide the timesteps, one bar each, with log-SNR at the top.

    Args:
        bounds: Name of each partition and its k + 1 bounds from 0 to T.
        log_snr: (T,) of each timestep.
        title: Of the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    total = len(log_snr)
    for row, edges in enumerate(bounds.values()):
        widths = np.diff(edges)
        colours = [_SHADES[at % len(_SHADES)] for at in range(len(widths))]
        ax.barh(np.full(len(widths), row), widths, left=edges[:-1], height=0.7, color=colours, edgecolor="white")
        for edge in edges[1:-1]:
            ax.text(edge, row - 0.37, str(edge), ha="center", va="bottom", fontsize=7)
    ax.set_yticks(range(len(bounds)), list(bounds), fontsize=8)
    ax.set_ylim(len(bounds) - 0.5, -0.75)
    ax.set(xlim=(0, total), xlabel="timestep t  (noise increases →)")
    at = np.linspace(0, total - 1, _TICKS).round().astype(int)
    top = ax.secondary_xaxis("top")
    top.set_xticks(at, [f"{round(log_snr[t], 1) + 0.0:.1f}" for t in at], fontsize=7)  # no -0.0
    top.set_xlabel("log-SNR", fontsize=8)
    ax.set_title(title)
    sns.despine(ax=ax, left=True)
    ax.tick_params(axis="y", length=0)
    return ax


def plot_cluster_count(
    scores: Mapping[str, pd.DataFrame],
    *,
    best: Mapping[str, int | None],
    colours: Mapping[str, str] | None = None,
    ylabel: str = "",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draws a criterion for every number of clusters, one line per cost, with a ring around the one it chooses.

    Args:
        scores: Name of each cost and the ``scores`` of its `cluster_count.ClusterCount`.
        best: The number chosen, None for no structure, which gets no ring.
        colours: Of the costs; a palette without it.
        ylabel: What is drawn.
        title: Of the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    palette = dict(zip(scores, sns.color_palette("colorblind", len(scores)), strict=True))
    for name, found in scores.items():
        colour = (palette if colours is None else colours)[name]
        ax.plot(found.index, found["value"], "o-", color=colour, markersize=4, linewidth=1.4, label=name)
        ax.vlines(
            found.index, found["value"] - found["standard_error"], found["value"] + found["standard_error"], colour
        )
        chosen = best.get(name)
        if chosen is not None:
            ax.plot(chosen, found["value"][chosen], "o", markersize=11, markerfacecolor="none", color=colour)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="number of clusters", ylabel=ylabel, title=title)
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(fontsize=8, frameon=False)
    sns.despine(ax=ax)
    return ax


def plot_silhouette(
    scores: Mapping[str, pd.DataFrame],
    *,
    best: Mapping[str, int | None],
    bound: float,
    even: pd.Series | None = None,
    colours: Mapping[str, str] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draws mean silhouette widths for every number of clusters; below the bound there is no structure.

    Args:
        scores: As for `plot_cluster_count`, of `cluster_count.silhouette_count`.
        best: Likewise.
        bound: `cluster_count.NO_STRUCTURE`.
        even: Widths of the same units by their distance in t alone.
        colours: As for `plot_cluster_count`.
        title: Of the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    ax.axhline(bound, color="#8c8c8c", linewidth=1, linestyle=":", zorder=0, label="no structure up to here")
    if even is not None:
        ax.plot(even.index, even, "--", color="black", linewidth=1, zorder=1, label="by distance in t alone")
    plot_cluster_count(scores, best=best, colours=colours, ylabel="mean silhouette width", title=title, ax=ax)
    ax.set_ylim(top=1)
    return ax
