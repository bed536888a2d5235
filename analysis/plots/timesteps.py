"""Matrices over pairs of single timesteps: cosines of their gradients, similarity of their representations."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from analysis.plots.style import DIVERGING, SEQUENTIAL, axes_or_new

_MAX_TICKS = 9
_UNDEFINED = "#c4c4c4"


def plot_timestep_affinity(
    cosine: xr.DataArray, *, title: str = "", colorbar: bool = True, ax: Axes | None = None
) -> Axes:
    """Draws cosines between timesteps: blue agrees, red conflicts, grey is undefined; log-SNR at the top.

    Args:
        cosine: (timestep, other_timestep), with the coordinate ``log_snr`` on ``timestep``.
        title: Of the panel.
        colorbar: Whether to draw the scale.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    image = ax.imshow(cosine.values, cmap=DIVERGING, vmin=-1.0, vmax=1.0, interpolation="nearest")
    _label(cosine, "timestep", ax, title)
    if colorbar:
        ax.figure.colorbar(image, ax=ax, shrink=0.85, pad=0.02)
    return ax


def plot_timestep_cka(
    cka: xr.DataArray, *, low: float = 0.0, title: str = "", colorbar: bool = True, ax: Axes | None = None
) -> Axes:
    """Draws the similarity of a block's representations at different timesteps: light is alike, grey is undefined.

    Args:
        cka: (probed_timestep, other_probed_timestep) of `representation.timestep_cka`, of one block or their mean.
        low: Where the scale begins; what is below has the darkest colour. Use one for all panels of a figure.
        title: Of the panel.
        colorbar: Whether to draw the scale.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    image: AxesImage = ax.imshow(cka.values, cmap=SEQUENTIAL, vmin=low, vmax=1.0, interpolation="nearest")
    _label(cka, "probed_timestep", ax, title)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, shrink=0.85, pad=0.02)
        bar.set_label("CKA", fontsize=8)
    return ax


def _label(matrix: xr.DataArray, dim: str, ax: Axes, title: str) -> None:
    """Timesteps at the left and bottom, log-SNR at the top; the background shows where a cell has no value."""
    ax.set_facecolor(_UNDEFINED)
    at = np.unique(np.linspace(0, matrix.sizes[dim] - 1, _MAX_TICKS).astype(int))
    labels = [str(t) for t in matrix[dim].values[at]]
    ax.set_xticks(at, labels, fontsize=8, rotation=90)
    ax.set_yticks(at, labels, fontsize=8)
    ax.set_xlabel("timestep t  (noise increases →)")
    ax.set_ylabel("timestep t")
    top = ax.secondary_xaxis("top")
    top.set_xticks(at, [f"{value:.1f}" for value in matrix["log_snr"].values[at]], fontsize=7, rotation=90)
    top.set_xlabel("log-SNR", fontsize=8)
    ax.set_title(title)
