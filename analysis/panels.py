"""What the report's figures are made of: panels, and a figure with its words."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

Runs = Sequence[xr.Dataset]
_PANEL_INCHES = 3.6
_DPI = 130


@dataclasses.dataclass(frozen=True)
class ReportFigure:
    """A figure with its words.

    Attributes:
        name: File name without ending.
        title: Headline.
        caption: What is drawn, and what to look for.
        figure: The figure itself.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    @functools.cached_property
    def png(self) -> bytes:
        """The figure as a PNG file."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=_DPI)
        return buffer.getvalue()


def panels(
    rows: int,
    columns: int,
    width: float = _PANEL_INCHES,
    height: float = _PANEL_INCHES,
    square: bool = False,
    width_ratios: Sequence[float] | None = None,
) -> tuple[Figure, np.ndarray]:
    """A figure outside pyplot's registry, so that nobody must close it, and its axes (rows, columns).

    Args:
        rows: Of panels.
        columns: Likewise.
        width: Of a panel, in inches.
        height: Likewise.
        square: Whether the panels keep an aspect ratio of their own, as matrices do.
        width_ratios: Relative widths of the columns; equal without them.
    """
    figure = Figure(figsize=(columns * width, rows * height), layout="compressed" if square else "constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, width_ratios=width_ratios)


def keep_outer_labels(axes: np.ndarray) -> None:
    """Leaves axis labels at the left and the bottom of a grid of panels only."""
    for (row, column), ax in np.ndenumerate(axes):
        if column:
            ax.set_ylabel("")
        if row < len(axes) - 1:
            ax.set_xlabel("")


def colour_limit(matrices: Sequence[xr.DataArray]) -> float:
    """The largest off-diagonal magnitude, rounded up to a tenth, between 0.2 and 1: one scale for a whole figure."""
    largest = 0.0
    for matrix in matrices:
        off = np.abs(matrix.values[~np.eye(matrix.sizes["task"], dtype=bool)])
        largest = max(largest, float(off[np.isfinite(off)].max(initial=0.0)))
    return float(np.clip(np.ceil(10 * largest) / 10, 0.2, 1.0))
