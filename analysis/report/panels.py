"""What the report is made of: panels, a figure with its words, a section of figures."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Sequence
from typing import Generic, TypeVar

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

Runs = Sequence[xr.Dataset]
_PANEL_INCHES = 3.6
DOTS_PER_INCH = 130
_WIDE_INCHES = 8
_PAGE_INCHES = 11.0
_FILM_INCHES = 8.5
"""Of a page, what is left for the matrices of a film."""


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
        """The figure as a PNG file of 256 colours, a quarter of the size that it would have in full."""
        canvas = FigureCanvasAgg(self.figure)
        self.figure.set_dpi(DOTS_PER_INCH)
        canvas.draw()
        self.figure.set_layout_engine("none")  # laid out once: half of what it takes to draw a figure again
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        buffer = io.BytesIO()
        picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(buffer, "png")
        return buffer.getvalue()

    @functools.cached_property
    def pdf(self) -> bytes:
        """The figure as a PDF file for papers: vector graphics, with text that can be searched and edited.

        The same for the same data: it carries no date.
        """
        buffer = io.BytesIO()
        with matplotlib.rc_context({"pdf.fonttype": 42}):  # TrueType; journals refuse matplotlib's usual Type 3
            self.figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Title": self.title})
        return buffer.getvalue()

    @property
    def narrow(self) -> bool:
        """Whether it is legible on a phone at a smaller width than the others."""
        return self.figure.get_figwidth() < _WIDE_INCHES

    def drawn(self, pdf: bool = False) -> DrawnFigure:
        """The figure as files; as PDF on request."""
        return DrawnFigure(self.name, self.title, self.caption, self.narrow, self.png, self.pdf if pdf else None)


@dataclasses.dataclass(frozen=True)
class DrawnFigure:
    """A `ReportFigure` as files.

    Attributes:
        name: File name without ending.
        title: Headline.
        caption: What is drawn, and what to look for.
        narrow: Whether it is legible on a phone at a smaller width than the others.
        png: As a PNG file.
        pdf: As a PDF file, if asked for.
    """

    name: str
    title: str
    caption: str
    narrow: bool
    png: bytes
    pdf: bytes | None


AnyFigure = TypeVar("AnyFigure", ReportFigure, DrawnFigure)


@dataclasses.dataclass(frozen=True)
class ReportSection(Generic[AnyFigure]):
    """Figures that answer one question.

    Attributes:
        title: Headline.
        figures: In order.
    """

    title: str
    figures: list[AnyFigure]


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


def film_panels(rows: int, frames: int, size: int) -> tuple[Figure, np.ndarray]:
    """Panels as wide as a page, one below the other, each for so many square matrices of ``size`` beside each other."""
    height = 0.75 + _FILM_INCHES * size / (frames * (size + 1))
    return panels(rows, 1, width=_PAGE_INCHES, height=height, square=True)


def keep_outer_labels(axes: np.ndarray) -> None:
    """Leaves axis labels at the left and the bottom of a grid of panels only."""
    for (row, column), ax in np.ndenumerate(axes):
        if column:
            ax.set_ylabel("")
        if row < len(axes) - 1:
            ax.set_xlabel("")


def keep_outer_axes(axes: np.ndarray, *, same_x: bool = True) -> None:
    """As `keep_outer_labels`, of axes that are the same in a row and in a column: numbers stand at the edges only, too.

    Args:
        axes: (rows, columns) of panels; those switched off do not count.
        same_x: Whether horizontal axes are the same in a column.
    """
    shown = np.array([[ax.axison for ax in row] for row in axes])
    for (row, column), ax in np.ndenumerate(axes):
        if shown[row, :column].any():
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
        if shown[row + 1 :, column].any():
            ax.set_xlabel("")
            ax.tick_params(labelbottom=not same_x)
        if same_x and shown[:row, column].any():
            ax.child_axes.clear()  # log-SNR above


def colour_limit(matrices: Sequence[xr.DataArray]) -> float:
    """The largest off-diagonal magnitude, rounded up to a tenth, between 0.2 and 1: one scale for a whole figure."""
    largest = 0.0
    for matrix in matrices:
        off = np.abs(matrix.values[~np.eye(matrix.sizes["task"], dtype=bool)])
        largest = max(largest, float(off[np.isfinite(off)].max(initial=0.0)))
    return float(np.clip(np.ceil(10 * largest) / 10, 0.2, 1.0))
