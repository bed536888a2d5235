"""What all figures share: colours by method, interval axes, and how a cell without a value looks."""

from __future__ import annotations

from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from analysis.methods import OPTIMISATION_NAMES, ROUTING_NAMES, split_method

_ROUTING_COLOURS = {
    "baseline": "#4d4d4d",
    "random": "#e69f00",
    "dtr": "#0072b2",
    "cluster": "#117733",
    "learned": "#aa4499",
}
assert set(_ROUTING_COLOURS) == set(ROUTING_NAMES)
_OTHER_COLOURS = (
    *("#009e73", "#cc79a7", "#999933", "#7fc31c", "#d55e00", "#44aa99", "#8c564b"),
    *("#882255", "#b3a2ff", "#c4a35a", "#e7298a", "#56b4e9", "#7b4fa3", "#6b8e9e"),
)
"""Of optimisations, in the order of `methods.OPTIMISATION_NAMES`, again from the start after the last."""
_SHADES = {"random": 0.5, "dtr": -0.4, "cluster": -0.22, "learned": 0.27}
"""How far a routed method's colour is from that of the optimisation alone, to white, or (below 0) to black."""
_VARIANT_SHADES = {"per_block": 0.4, "depth": -0.4}
DIVERGING = "RdBu"
"""Red for conflict, blue for agreement; told apart by all common forms of colour blindness."""
SEQUENTIAL = "viridis"
_ROOM = 0.84
"""Of the distance between two places, what the marks of one may take."""
_LOG_FROM = 5.0
_MAX_LABELS = 16
_MAX_ANNOTATED = 10


def method_colour(method: str) -> str:
    """The one colour of a method, the same in every figure.

    Without an optimisation of its own it is the routing's (Okabe and Ito's palette for the first three). An
    optimisation has a hue, in a shade for each routing.
    """
    kind, optimisation = split_method(method)
    routing, *variants = kind.split("+")
    if optimisation or routing not in _ROUTING_COLOURS:
        colour = _shaded(_hue(optimisation or routing), _SHADES.get(routing, 0.0))
    else:
        colour = _ROUTING_COLOURS[routing]
    for variant in variants:
        colour = _shaded(colour, _VARIANT_SHADES.get(variant, 0.0))
    return colour


def _hue(parts: str) -> str:
    known = list(OPTIMISATION_NAMES)
    # Not hash(): it differs between processes.
    places = [known.index(part) if part in known else sum(part.encode()) for part in parts.split("+")]
    return _OTHER_COLOURS[(sum(places) + 3 * (len(places) - 1)) % len(_OTHER_COLOURS)]


def _shaded(colour: str, share: float) -> str:
    """A colour mixed with so much white, or with so much black if the share is negative."""
    other = float(share > 0)
    red, green, blue = (own + abs(share) * (other - own) for own in to_rgb(colour))
    return to_hex((red, green, blue))


def gap_between(count: int, widest: float) -> float:
    """How far apart the marks of so many methods stand at one place of an axis, so that none comes near the next."""
    return min(widest, _ROOM / max(count, 1))


def axes_or_new(ax: Axes | None) -> Axes:
    """The axes given, or those of a new figure."""
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def draw_legend(ax: Axes, loc: Literal["best", "upper center"] = "best", ncols: int = 1) -> None:
    """A legend that stays legible on top of what it must cover."""
    ax.legend(fontsize=8, facecolor="white", edgecolor="none", framealpha=0.8, loc=loc, ncols=ncols)


def scale_losses(ax: Axes, limits: tuple[float, float] | None = None) -> None:
    """Makes the value axis logarithmic if what is drawn spans more than a factor of five, with plain numbers.

    Args:
        ax: With everything drawn.
        limits: Decide by these instead, so that several panels get the same scale.
    """
    low, high = ax.dataLim.intervaly if limits is None else limits
    if low > 0 and high > _LOG_FROM * low:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def draw_matrix(
    matrix: xr.DataArray, ax: Axes, *, cmap: str, vmin: float, vmax: float, colorbar: bool, annotate: bool = True
) -> None:
    """Draws (task, other_task): intervals in t at the left and bottom, log-SNR at the top, NaN cells hatched.

    Cells show their value while there are few enough to read.
    """
    values = matrix.values
    image = ax.imshow(values, cmap=cmap, vmin=vmin, vmax=vmax, interpolation="nearest")
    for row, column in np.argwhere(np.isnan(values)):
        hatch_cell(ax, row, column)
    if annotate:
        write_cells(ax, image, values)
    label_intervals(ax, matrix, "y")
    label_intervals(ax, matrix, "x")
    sns.despine(ax=ax, left=True, bottom=True)
    if colorbar:
        ax.figure.colorbar(image, ax=ax, shrink=0.85, pad=0.02)


def write_cells(ax: Axes, image: AxesImage, values: npt.NDArray[np.float64]) -> None:
    """Writes into each cell its value, while there are few enough cells in a row to read."""
    if values.shape[1] > _MAX_ANNOTATED:
        return
    colours = image.to_rgba(values)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = colours[row, column]
            colour = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
            ax.text(
                column, row, _short(value), ha="center", va="center", fontsize=7, color=colour, in_layout=False
            )  # inside the axes anyway, and measuring so many texts takes longer than drawing them


def hatch_cell(ax: Axes, row: int, column: int) -> None:
    """Marks a cell as undefined: hatched, never the colour of a value."""
    corner = (column - 0.5, row - 0.5)
    ax.add_patch(
        Rectangle(corner, 1, 1, facecolor="#f2f2f2", edgecolor="#a6a6a6", hatch="////", linewidth=0, in_layout=False)
    )


def grey_diagonal(ax: Axes, size: int) -> None:
    """Covers a diagonal that is 1 by definition and says nothing."""
    for at in range(size):
        ax.add_patch(
            Rectangle((at - 0.5, at - 0.5), 1, 1, facecolor="#d9d9d9", edgecolor="none", zorder=3, in_layout=False)
        )


def label_intervals(ax: Axes, tasks: xr.DataArray | xr.Dataset, axis: str, *, log_snr: bool = True) -> None:
    """Names the tasks 0 ... K - 1 along an axis by their interval in t; on x, log-SNR, if known, stands above."""
    every = -(-tasks.sizes["task"] // _MAX_LABELS)
    at = np.arange(0, tasks.sizes["task"], every)
    labels = [str(label).removeprefix("t") for label in tasks["interval"].values[at]]
    if axis == "y":
        ax.set_yticks(at, labels, fontsize=8)
        ax.set_ylabel("timesteps t")
        return
    ax.set_xticks(at, labels, rotation=90, fontsize=8)
    ax.set_xlabel("timesteps t  (noise increases →)")
    if log_snr and "log_snr" in tasks.coords:
        top = ax.secondary_xaxis("top")
        top.set_xticks(at, [f"{value:.1f}" for value in tasks["log_snr"].values[at]], fontsize=7)
        top.set_xlabel("log-SNR", fontsize=8)
        top.tick_params(length=2)
        top.spines["top"].set_visible(False)


def _short(value: float) -> str:
    """Two decimals without the leading zero: .53, -.07, 1.0; none beyond 10, where they would run into each other."""
    if abs(value) >= 9.995:
        return f"{value:.0f}"
    text = f"{value:.2f}"
    text = "0" if text in ("0.00", "-0.00") else text.replace("0.", ".", 1)
    return "1.0" if text == "1.00" else text
