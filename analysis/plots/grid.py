"""A grid of routings and optimisations: the value of every cell, and what each choice changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import Formatter, MaxNLocator

from analysis.grid import OPTIMISATION, ROUTING, Effect
from analysis.methods import BASELINE, PLAIN, method_name
from analysis.plots.style import draw_legend, gap_between, method_colour

_GAP = 0.26
_BELOW = 0.33
"""How far below a cell's mean its seeds stand, which the interval would hide, as a share of the gap between cells."""
_MOST_TICKS = 5
_GREY = "#4d4d4d"
_STRIPE = "#ededed"
_MISSING = "missing"


class _Row(NamedTuple):
    """One row of a figure, from the top."""

    at: float
    seeds_at: float
    routing: str
    optimisation: str


def routing_colour(routing: str) -> str:
    """The colour of a routing, as of its method without an optimisation of its own."""
    return method_colour(BASELINE if routing == PLAIN else routing)


def plot_grid(
    cells: pd.DataFrame,
    seeds: pd.DataFrame,
    quantity: str = "val_loss",
    *,
    level: float | None = None,
    xlabel: str = "final validation loss",
    title: str = "",
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws every cell: a dot per seed, the mean with its interval beside them; a row per optimisation.

    Args:
        cells: `grid.grid_cells`.
        seeds: `grid.grid_frame`.
        quantity: The column of ``seeds`` that ``cells`` are of.
        level: A value to compare with, such as the mean of the plain cell, drawn as a line.
        xlabel: What is drawn.
        title: Of the panel.
        legend: Whether to name the colours.
        ax: Where to draw.
    """
    rows = _rows(cells)
    ax = _axes(ax, len(rows))
    _stripes(ax, rows)
    if level is not None:
        ax.axvline(level, color=_GREY, linewidth=1, linestyle="--", zorder=1)
    by_cell = _by_cell(cells)
    values = seeds.groupby([ROUTING, OPTIMISATION], observed=True)[quantity]
    points = {cell: own.to_numpy() for cell, own in values}
    for row in rows:
        cell = row.routing, row.optimisation
        _draw_row(ax, row, points.get(cell, np.empty(0)), by_cell[cell], "mean")
    _finish(ax, rows, xlabel, title, legend)
    return ax


def plot_grid_effects(
    effects: pd.DataFrame,
    by_seed: pd.DataFrame,
    effect: Effect = "routing",
    *,
    xlabel: str = "difference in final validation loss",
    title: str = "",
    formatter: Formatter | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws one kind of effect of every cell: a dot per seed, the mean with its interval; a star is significant.

    Args:
        effects: `grid.effect_intervals`.
        by_seed: `grid.seed_effects` that they are of.
        effect: ``"routing"``: against the plain network; ``"optimisation"``: against the uniform one;
            ``"interaction"``: how far the two do not add up.
        xlabel: What is drawn; below zero is better.
        title: Of the panel.
        formatter: Of the value axis.
        legend: Whether to name the colours.
        ax: Where to draw.
    """
    own, dots = (table[table["effect"] == effect] for table in (effects, by_seed))
    rows = _rows(own)
    ax = _axes(ax, len(rows))
    _stripes(ax, rows)
    ax.axvline(0, color=_GREY, linewidth=1, zorder=1)
    by_cell = _by_cell(own)
    points = {cell: found["value"].to_numpy() for cell, found in dots.groupby([ROUTING, OPTIMISATION])}
    for row in rows:
        cell = row.routing, row.optimisation
        if cell not in by_cell:
            continue
        _draw_row(ax, row, points.get(cell, np.empty(0)), by_cell[cell], "estimate")
        if by_cell[cell]["significant"]:
            colour = routing_colour(row.routing)
            ax.scatter([0.985], [row.at], marker="*", s=46, color=colour, transform=ax.get_yaxis_transform(), zorder=4)
    if formatter is not None:
        ax.xaxis.set_major_formatter(formatter)
    _finish(ax, rows, xlabel, title, legend)
    return ax


def grid_height(cells: int) -> float:
    """Inches for a panel with so many cells."""
    return 1.3 + 0.18 * cells


def _axes(ax: Axes | None, cells: int) -> Axes:
    return plt.subplots(figsize=(6.4, grid_height(cells)), layout="constrained")[1] if ax is None else ax


def _by_cell(table: pd.DataFrame) -> dict[tuple[str, str], pd.Series]:
    return {(str(row[ROUTING]), str(row[OPTIMISATION])): row for _, row in table.iterrows()}


def _rows(table: pd.DataFrame) -> list[_Row]:
    """Every routing of every optimisation, in their order of appearance, one below the other."""
    routings, optimisations = (list(dict.fromkeys(table[axis])) for axis in (ROUTING, OPTIMISATION))
    gap = gap_between(len(routings), _GAP)
    rows = []
    for place, optimisation in enumerate(optimisations):
        for index, routing in enumerate(routings):
            at = place + (index - (len(routings) - 1) / 2) * gap
            rows.append(_Row(at, at + _BELOW * gap, str(routing), str(optimisation)))
    return rows


def _draw_row(ax: Axes, row: _Row, points: np.ndarray, cell: pd.Series, centre: str) -> None:
    colour = routing_colour(row.routing)
    mean, low, high = (float(cell[name]) for name in (centre, "low", "high"))
    shown = points[np.isfinite(points)]
    ax.scatter(shown, np.full(len(shown), row.seeds_at), s=13, color=colour, alpha=0.6, linewidths=0, zorder=2)
    if np.isfinite(low):
        ax.hlines(row.at, low, high, color=colour, linewidth=1.3, zorder=2)
    if np.isfinite(mean):
        ax.scatter([mean], [row.at], s=34, color=colour, edgecolors="white", linewidths=0.8, zorder=3)
        return
    word = "diverged" if len(points) else _MISSING
    ax.text(
        0.01, row.at, word, transform=ax.get_yaxis_transform(), color=colour, fontsize=6.5, va="center", style="italic"
    )


def _stripes(ax: Axes, rows: Sequence[_Row]) -> None:
    """Every second optimisation on grey, so that rows are followed across the panel."""
    for place in range(1, len(dict.fromkeys(row.optimisation for row in rows)), 2):
        ax.axhspan(place - 0.5, place + 0.5, color=_STRIPE, zorder=0, linewidth=0)


def _finish(ax: Axes, rows: Sequence[_Row], xlabel: str, title: str, legend: bool) -> None:
    names = list(dict.fromkeys(row.optimisation for row in rows))
    ax.set_yticks(range(len(names)), [method_name(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel=xlabel, title=title)
    ax.xaxis.set_major_locator(MaxNLocator(_MOST_TICKS))
    ax.grid(axis="x", color="#d9d9d9", linewidth=0.6)
    ax.set_axisbelow(True)
    if legend:
        for routing in dict.fromkeys(row.routing for row in rows):
            ax.scatter([], [], s=40, color=routing_colour(routing), label=method_name(routing))
        draw_legend(ax)
    sns.despine(ax=ax, left=True)
