"""Where in the network tasks conflict: by block or layer."""

from __future__ import annotations

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes

from analysis.methods import method_name, ordered
from analysis.plots.style import (
    DIVERGING,
    axes_or_new,
    draw_legend,
    gap_between,
    hatch_cell,
    label_intervals,
    method_colour,
    write_cells,
)

_DODGE = 0.18
_MAX_NAMES = 40


def plot_block_rates(
    rates: xr.Dataset, *, null: float = 0.5, null_error: float | None = None, title: str = "", ax: Axes | None = None
) -> Axes:
    """Draws the conflict rate of every block or layer, one colour per method, with the band of pure noise.

    Args:
        rates: ``value`` and ``half_width`` (method, block | layer), and ``conflicting``: the share of pairs that
            conflict significantly, drawn as a bar.
        null: Rate that pure noise gives.
        null_error: Standard deviation of such a rate of pure noise; the band is two of them wide on either side.
        title: Of the panel.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    if null_error is not None:
        band = (null - 2 * null_error, null + 2 * null_error)
        ax.axhspan(*band, color="#e8e8e8", zorder=0, label="pure noise, ± 2 s.d.")
    ax.axhline(null, color="#8c8c8c", linewidth=1, linestyle="--", zorder=1)
    dim = next(str(dim) for dim in rates["value"].dims if dim != "method")
    methods = ordered(str(name) for name in rates["method"].values)
    gap = gap_between(len(methods), _DODGE)
    for index, method in enumerate(methods):
        own = rates.sel({"method": method})
        at = np.arange(rates.sizes[dim]) + (index - (len(methods) - 1) / 2) * gap
        colour = method_colour(method)
        label = "share that conflicts significantly" if index == 0 else None
        ax.bar(at, own["conflicting"].values, width=gap * 0.9, color=colour, alpha=0.4, label=label)
        error = np.nan_to_num(own["half_width"].values)
        ax.errorbar(at, own["value"].values, yerr=error, fmt="o", color=colour, markersize=4, label=method_name(method))
    _name_blocks(ax, rates[dim], "x")
    ax.set(ylim=(0, 1), ylabel="share of pairs with cos < 0", title=title)
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    draw_legend(ax)
    sns.despine(ax=ax)
    return ax


def plot_block_cosines(
    cosine: xr.DataArray, *, limit: float = 1.0, title: str = "", colorbar: bool = True, ax: Axes | None = None
) -> Axes:
    """Draws a cosine of every task in every block or layer: red conflicts, blue agrees, hatched is undefined.

    Args:
        cosine: (block | layer, task), such as `update.rest_cosine`.
        limit: Value at which colours saturate, the same on both sides of zero.
        title: Of the panel.
        colorbar: Whether to draw the scale.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    dim = next(str(dim) for dim in cosine.dims if dim != "task")
    values = cosine.transpose(dim, "task").values
    image = ax.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
    for row, column in np.argwhere(np.isnan(values)):
        hatch_cell(ax, row, column)
    write_cells(ax, image, values)
    label_intervals(ax, cosine, "x")
    _name_blocks(ax, cosine[dim], "y")
    ax.set_title(title)
    sns.despine(ax=ax, left=True, bottom=True)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
        bar.set_label("cosine with the rest  (hatched: undefined)", fontsize=8)
    return ax


def _name_blocks(ax: Axes, names: xr.DataArray, axis: str) -> None:
    at = np.arange(0, names.size, -(-names.size // _MAX_NAMES))
    labels = [str(name) for name in names.values[at]]
    if axis == "x":
        ax.set_xticks(at, labels, rotation=45, ha="right", fontsize=8)
    else:
        ax.set_yticks(at, labels, fontsize=8)
