"""Affinities of any kind: one matrix, a film over training, and how far several of them agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from analysis.plots.style import (
    DIVERGING,
    SEQUENTIAL,
    axes_or_new,
    draw_matrix,
    grey_diagonal,
    hatch_cell,
    label_intervals,
    write_cells,
)

_DOT = 5
_DOT_SHIFT = 0.36
_FILM_DOT = 1.5
_MOST_LABELS = 16


def plot_affinity(
    affinity: xr.DataArray,
    *,
    significant: xr.DataArray | None = None,
    limit: float | None = None,
    signed: bool | None = None,
    title: str = "",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws an affinity between tasks: blue helps and red harms, or, if it cannot be negative, light is more.

    Args:
        affinity: (task, other_task); a diagonal that is 1 by definition is greyed. Of a directed one rows are trained
            on, columns affected.
        significant: (task, other_task) booleans, as of `affinity.significant_cells`; these cells get a dot.
        limit: Value at which colours saturate; the largest magnitude without it. Use one for all panels of a figure.
        signed: Whether values can be negative: a scale centred on zero, or one that begins there. Whether any value
            is, without it.
        title: Of the panel.
        colorbar: Whether to draw the scale.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    values = affinity.values
    top = float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0 if limit is None else limit
    centred = bool((values < 0).any()) if signed is None else signed
    cmap, low = (DIVERGING, -top) if centred else (SEQUENTIAL, 0.0)
    draw_matrix(affinity, ax, cmap=cmap, vmin=low, vmax=top, colorbar=colorbar)
    if _is_one_or_undefined(values.diagonal()):
        grey_diagonal(ax, len(values))
    if affinity.attrs.get("directed", False):
        ax.set_ylabel("trained on timesteps t")
        ax.set_xlabel("affected timesteps t  (noise increases →)")
    if significant is not None:
        _draw_dots(ax, significant.values & np.isfinite(values))
    ax.set_title(title)
    return ax


def plot_affinity_film(
    film: xr.DataArray,
    *,
    significant: xr.DataArray | None = None,
    limit: float = 1.0,
    signed: bool = True,
    title: str = "",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws an affinity window by window of training, side by side on one scale; columns are in the order of rows.

    Args:
        film: (window, task, other_task) of `affinity.affinity_film`.
        significant: The same of booleans; these cells get a dot.
        limit: Value at which colours saturate.
        signed: Whether the scale is centred on zero, or begins there.
        title: Of the panel.
        colorbar: Whether to draw the scale.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    values = film.transpose("window", "task", "other_task").values
    windows, size, _ = values.shape
    pitch = size + 1
    wide = np.ma.masked_all((size, windows * pitch - 1))
    for at, frame in enumerate(values):
        wide[:, at * pitch : at * pitch + size] = frame
    image = ax.imshow(
        wide,
        cmap=DIVERGING if signed else SEQUENTIAL,
        vmin=-limit if signed else 0.0,
        vmax=limit,
        interpolation="nearest",
    )
    for window, row, column in np.argwhere(np.isnan(values)):
        hatch_cell(ax, row, window * pitch + column)
    if _is_one_or_undefined(np.diagonal(values, axis1=1, axis2=2)):
        for window, at in np.ndindex(windows, size):
            corner = (window * pitch + at - 0.5, at - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, facecolor="#d9d9d9", edgecolor="none", zorder=3))
    if significant is not None:
        marked = significant.transpose("window", "task", "other_task").values & np.isfinite(values)
        window, row, column = np.nonzero(marked)
        ax.scatter(window * pitch + column, row, s=_FILM_DOT, color="black", zorder=4)
    steps = zip(film["first_step"].values, film["last_step"].values, strict=True)
    ax.set_xticks(np.arange(windows) * pitch + (size - 1) / 2, [_span(*step) for step in steps], fontsize=8)
    ax.set_xlabel("optimizer steps")
    ax.tick_params(axis="x", length=0)
    label_intervals(ax, film, "y")
    if "log_snr" in film.coords:
        _log_snr_right(ax, film)
    sns.despine(ax=ax, left=True, bottom=True)
    ax.set_title(title, loc="left")
    if colorbar:
        ax.figure.colorbar(image, ax=ax, pad=0.06, aspect=12)
    return ax


def plot_agreement(
    agreement: pd.DataFrame,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws rank correlations between affinities: above the diagonal plain, below it given the distance between tasks.

    Args:
        agreement: `agreement.agreement_table`. What is significant gets a dot.
        names: The affinities in order, also such as are not in the table; those of the table without it.
        title: Of the panel.
        colorbar: Whether to draw the scale.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    names = list(dict.fromkeys([*agreement["first"], *agreement["second"]])) if names is None else list(names)
    place = {name: at for at, name in enumerate(names)}
    values = np.full((len(names), len(names)), np.nan)
    marked = np.zeros(values.shape, dtype=bool)
    one, other = ([place[name] for name in agreement[side]] for side in ("first", "second"))
    values[one, other], values[other, one] = agreement["correlation"], agreement["partial"]
    marked[one, other], marked[other, one] = agreement["significant"], agreement["partial_significant"]
    _draw_dots(ax, marked)
    image = ax.imshow(values, cmap=DIVERGING, vmin=-1, vmax=1, interpolation="nearest")
    for row, column in np.argwhere(np.isnan(values)):
        hatch_cell(ax, row, column)
    write_cells(ax, image, values)
    grey_diagonal(ax, len(names))
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xticks(range(len(names)), names, fontsize=8, rotation=40, ha="right", rotation_mode="anchor")
    sns.despine(ax=ax, left=True, bottom=True)
    ax.set_title(title)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, shrink=0.85, pad=0.02)
        bar.set_label("rank correlation", fontsize=8)
    return ax


def _draw_dots(ax: Axes, marked: npt.NDArray[np.bool_]) -> None:
    """A dot in the upper right corner of each cell marked."""
    row, column = np.nonzero(marked)
    ax.scatter(column + _DOT_SHIFT, row - _DOT_SHIFT, s=_DOT, color="black", zorder=4)


def _is_one_or_undefined(diagonal: npt.NDArray[np.float64]) -> bool:
    return bool(((diagonal == 1) | np.isnan(diagonal)).all())


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}-{last:,}"


def _log_snr_right(ax: Axes, tasks: xr.DataArray) -> None:
    """log-SNR of the intervals on a second axis at the right."""
    at = np.arange(0, tasks.sizes["task"], -(-tasks.sizes["task"] // _MOST_LABELS))
    right = ax.secondary_yaxis("right")
    right.set_yticks(at, [f"{value:.1f}" for value in tasks["log_snr"].values[at]], fontsize=7)
    right.set_ylabel("log-SNR", fontsize=8)
    right.tick_params(length=2)
    right.spines["right"].set_visible(False)
