"""A matrix as a picture for MLflow's image slider, which shows it 256 pixels wide: large type, few labels.

Drawn with Pillow alone, because importing and running matplotlib inside a training step costs too much; figures for
papers are made by `analysis.plots`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colors = Literal["diverging", "sequential"]
_INTERVAL = re.compile(r"t(\d+)-\d+")

# Orange against blue is told apart with every common colour-vision deficiency, and white is zero. As in the figures
# of `analysis.plots`, blue is agreement and the warm colour conflict.
_DIVERGING = ((0xA8, 0x32, 0x05), (0xF6, 0xA0, 0x5A), (0xFF, 0xFF, 0xFF), (0x6F, 0xA8, 0xDC), (0x0B, 0x3C, 0x8C))
# Lightness falls evenly, so that it reads in grey too.
_SEQUENTIAL = ((0xFF, 0xFA, 0xEB), (0xF9, 0xC2, 0x7B), (0xE0, 0x73, 0x3C), (0x9C, 0x2F, 0x3F), (0x35, 0x0E, 0x38))
_INK = (0x22, 0x22, 0x22)
_MISSING = ((0xC4, 0xC4, 0xC4), (0xA0, 0xA0, 0xA0))

_SIZE = 512
_MIN_SIZE = 192
_FILLED = 0.8
"""The share of the picture's height that is drawn on; MLflow's card of images hides what is below, labels included."""
_FONT = 21  # in an image of 512 pixels: ten pixels high once MLflow has halved it


def heatmap_image(
    matrix: np.ndarray,
    labels: Sequence[str],
    *,
    title: str,
    column_labels: Sequence[str] | None = None,
    vmin: float = -1.0,
    vmax: float = 1.0,
    colors: Colors = "diverging",
    size: int = _SIZE,
) -> np.ndarray:
    """Draws a matrix with its labels, a title and a colour bar.

    Args:
        matrix: (R, C), row 0 at the top. NaN is drawn hatched grey, since it is not zero; values beyond the range,
            infinities included, in the colour of its end.
        labels: R names of the rows; if there are too many to read, every n-th is shown.
        title: Drawn above, shrunk or cut to fit.
        column_labels: C names of the columns; by default those of the rows, of intervals ``t250-374`` their lower ends.
        vmin: Lower end of the range.
        vmax: Upper end of the range.
        colors: ``"diverging"`` for signed values (orange below zero, white at zero, blue above, equally strong at
            equal distance) or ``"sequential"`` for magnitudes (darker is more).
        size: Height and width of the image in pixels, at least 192. The foot stays white.

    Returns:
        uint8, (size, size, 3).

    Raises:
        ValueError: If shapes, labels, range or size do not fit.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    column_labels = [_start(label) for label in labels] if column_labels is None else column_labels
    if matrix.ndim != 2 or matrix.shape != (len(labels), len(column_labels)) or matrix.size == 0:
        raise ValueError(f"matrix {matrix.shape} needs {len(labels)} x {len(column_labels)} entries, one per label")
    if not (np.isfinite([vmin, vmax]).all() and vmin < vmax):
        raise ValueError(f"the range must be finite and increasing, got {vmin} to {vmax}")
    if size < _MIN_SIZE:
        raise ValueError(f"size must be at least {_MIN_SIZE} pixels to be legible, got {size}")
    if colors not in ("diverging", "sequential"):
        raise ValueError(f"colors must be 'diverging' or 'sequential', got {colors!r}")
    canvas = _Canvas(size, title, labels, column_labels, bar_labels=[_number(vmax), _number(vmin)])
    canvas.paste_matrix(_colored(matrix, vmin, vmax, colors))
    canvas.draw_ticks(labels, column_labels)
    canvas.draw_bar(vmin, vmax, colors)
    return np.asarray(canvas.image)


def _colored(matrix: np.ndarray, vmin: float, vmax: float, colors: Colors) -> np.ndarray:
    """(R, C) -> uint8 (R, C, 3); NaN becomes (0, 0, 0), which no colour map contains."""
    if colors == "diverging":
        reach = max(abs(vmin), abs(vmax))
        position = (np.clip(matrix, vmin, vmax) / reach + 1) / 2
        stops = np.array(_DIVERGING, dtype=np.float64)
    else:
        position = (np.clip(matrix, vmin, vmax) - vmin) / (vmax - vmin)
        stops = np.array(_SEQUENTIAL, dtype=np.float64)
    places = np.linspace(0, 1, len(stops))
    channels = [np.interp(np.nan_to_num(position), places, stops[:, channel]) for channel in range(3)]
    pixels = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    pixels[np.isnan(matrix)] = 0
    return pixels


class _Canvas:
    """Lays out title, matrix, tick labels and colour bar."""

    def __init__(
        self, size: int, title: str, labels: Sequence[str], column_labels: Sequence[str], bar_labels: Sequence[str]
    ) -> None:
        height = round(_FILLED * size)
        self.image = Image.new("RGB", (size, size), "white")
        self._draw = ImageDraw.Draw(self.image)
        self._unit = size / _SIZE
        self._font = ImageFont.load_default(size=_FONT * self._unit)
        self._gap = round(8 * self._unit)
        # Long names may take a third of the picture at most, and are cut beyond that.
        widest = max(self._width(label) for label in labels)
        self._margin = min(widest, size // 3) + 2 * self._gap
        self._bar = round(20 * self._unit)
        right = self._bar + max(self._width(label) for label in bar_labels) + 3 * self._gap
        self._top = self._draw_title(title, size)
        self._area_width = size - self._margin - right
        longest = max(self._width(label) for label in column_labels)
        self._turned = longest + 2 * self._unit > self._area_width / len(column_labels)
        self._below = min(longest, size // 3) if self._turned else round(_FONT * self._unit)
        self._area_height = height - self._top - self._below - 2 * self._gap

    def paste_matrix(self, pixels: np.ndarray) -> None:
        """Enlarges (R, C, 3) to the plot area, without blurring, and hatches black cells."""
        height, width = self._area_height, self._area_width
        rows = np.arange(height) * pixels.shape[0] // height
        columns = np.arange(width) * pixels.shape[1] // width
        area = pixels[rows[:, None], columns[None, :]]
        stripes = (np.arange(height)[:, None] + np.arange(width)[None, :]) // max(round(6 * self._unit), 1) % 2
        hatch = np.array(_MISSING, dtype=np.uint8)[stripes]
        area = np.where((area == 0).all(axis=-1, keepdims=True), hatch, area)
        self.image.paste(Image.fromarray(area), (self._margin, self._top))
        box = (self._margin - 1, self._top - 1, self._margin + width, self._top + height)
        self._draw.rectangle(box, outline=_INK, width=1)

    def draw_ticks(self, labels: Sequence[str], column_labels: Sequence[str]) -> None:
        """Row labels to the left; column labels below, turned by 90 degrees where they would collide."""
        line = _FONT * self._unit * 1.15
        for row, label in _legible(labels, self._area_height, line):
            y = self._top + (row + 0.5) * self._area_height / len(labels)
            text = self._cut(label, self._margin - 2 * self._gap)
            self._draw.text((self._margin - self._gap, y), text, fill=_INK, font=self._font, anchor="rm")
        shown = _legible(column_labels, self._area_width, line) if self._turned else list(enumerate(column_labels))
        for column, label in shown:
            x = self._margin + (column + 0.5) * self._area_width / len(column_labels)
            if not self._turned:
                y = self._top + self._area_height + self._gap
                self._draw.text((x, y), label, fill=_INK, font=self._font, anchor="mt")
                continue
            text = self._cut(label, self._below)
            turned = self._text_image(text).rotate(90, expand=True)
            self.image.paste(turned, (round(x - turned.width / 2), self._top + self._area_height + self._gap))

    def draw_bar(self, vmin: float, vmax: float, colors: Colors) -> None:
        """The colour bar, labelled at its ends and, where it lies inside, at zero."""
        left = self._margin + self._area_width + self._gap
        values = np.linspace(vmax, vmin, self._area_height)
        bar = np.repeat(_colored(values[:, None], vmin, vmax, colors), self._bar, axis=1)
        self.image.paste(Image.fromarray(bar), (left, self._top))
        box = (left - 1, self._top - 1, left + self._bar, self._top + self._area_height)
        self._draw.rectangle(box, outline=_INK, width=1)
        line = _FONT * self._unit
        for value in {vmin, vmax} | ({0.0} if vmin < 0 < vmax else set()):
            y = self._top + (vmax - value) / (vmax - vmin) * self._area_height
            y = min(max(y, self._top + line / 2), self._top + self._area_height - line / 2)
            self._draw.text((left + self._bar + self._gap, y), _number(value), fill=_INK, font=self._font, anchor="lm")

    def _draw_title(self, title: str, size: int) -> int:
        """Draws the title as large as fits; returns the y below it."""
        points = 1.2 * _FONT
        while points > 0.8 * _FONT:
            font = ImageFont.load_default(size=points * self._unit)
            if font.getlength(title) <= size - 2 * self._gap:
                break
            points -= 1
        else:
            font, title = self._font, self._cut(title, size - 2 * self._gap)
        self._draw.text((size / 2, self._gap), title, fill=_INK, font=font, anchor="mt")
        return round(1.2 * _FONT * self._unit) + 2 * self._gap

    def _text_image(self, text: str) -> Image.Image:
        left, top, right, bottom = self._font.getbbox(text)
        tile = Image.new("RGB", (max(round(right - left), 1), max(round(bottom - top), 1)), "white")
        ImageDraw.Draw(tile).text((-left, -top), text, fill=_INK, font=self._font)
        return tile

    def _width(self, text: str) -> int:
        return int(self._font.getlength(text)) + 1

    def _cut(self, text: str, width: int) -> str:
        if self._width(text) <= width:
            return text
        while text and self._width(text + "…") > width:
            text = text[:-1]
        return text + "…"


def _start(label: str) -> str:
    """``250`` of ``t250-374``; other labels as they are."""
    found = _INTERVAL.fullmatch(label)
    return found[1] if found else label


def _legible(labels: Sequence[str], length: int, line: float) -> list[tuple[int, str]]:
    """The labels with their positions, thinned out evenly so that each has a line of its own."""
    every = max(int(np.ceil(len(labels) * line / length)), 1)
    return [(index, labels[index]) for index in range(0, len(labels), every)]


def _number(value: float) -> str:
    return f"{value:.3g}"
