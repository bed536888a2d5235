"""Matrices over pairs of tasks: gradient cosines, and overlaps of channel sets."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from analysis.plots.style import DIVERGING, SEQUENTIAL, axes_or_new, draw_matrix, grey_diagonal


def plot_conflict_matrix(
    cosine: xr.DataArray,
    *,
    significant: xr.DataArray | None = None,
    limit: float = 1.0,
    title: str = "",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws gradient cosines between tasks: red conflicts, blue agrees, hatched is undefined (signal within noise).

    Args:
        cosine: (task, other_task), plain or corrected. The diagonal is 1 by definition and greyed.
        significant: (task, other_task) booleans; pairs that differ from zero get a dot.
        limit: Value at which colours saturate, the same on both sides of zero; use one for all panels of a figure.
        title: Of the panel.
        colorbar: Whether to draw the scale.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    draw_matrix(cosine, ax, cmap=DIVERGING, vmin=-limit, vmax=limit, colorbar=colorbar)
    grey_diagonal(ax, cosine.sizes["task"])
    if significant is not None:
        row, column = np.nonzero(significant.values & np.isfinite(cosine.values))
        ax.scatter(column + 0.36, row - 0.36, s=5, color="black", zorder=4)
    ax.set_title(title)
    return ax


def plot_overlap(overlap: xr.DataArray, *, title: str = "", colorbar: bool = True, ax: Axes | None = None) -> Axes:
    """Draws an overlap in [0, 1] between tasks, such as `affinity.mask_overlap` or `activations.active_overlap`."""
    ax = axes_or_new(ax)
    draw_matrix(overlap, ax, cmap=SEQUENTIAL, vmin=0.0, vmax=1.0, colorbar=colorbar)
    ax.set_title(title)
    return ax
