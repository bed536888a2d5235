"""The figures of a grid of routings and optimisations: its cells, what each choice changes, the curves, the samples."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from analysis import convergence, frames
from analysis.grid import (
    LOSSES,
    OPTIMISATION,
    ROUTING,
    Effect,
    base_choice,
    effect_intervals,
    fidelity_columns,
    grid_axes,
    grid_cells,
    seed_effects,
)
from analysis.methods import BASELINE, PLAIN, UNIFORM, method_name
from analysis.plots.curves import plot_curves
from analysis.plots.grid import grid_height, plot_grid, plot_grid_effects, routing_colour
from analysis.plots.style import scale_losses
from analysis.report.grid_words import FIDELITY_WORDS, LOSS_WORDS
from analysis.report.panels import ReportFigure, keep_outer_axes, panels

EFFECT_FIGURES: dict[Effect, tuple[str, str]] = {
    "routing": ("grid_routing_effects", "What routing changes"),
    "optimisation": ("grid_optimisation_effects", "What the optimisation changes"),
    "interaction": ("grid_interactions", "Do routing and optimisation add up?"),
}
"""Name and title of the figure of each kind of difference."""
_CAPTIONS: dict[Effect, str] = {
    "routing": "Each routed network minus the plain one trained with the same optimisation and seed",
    "optimisation": "Each optimisation minus the uniform one with the same routing and seed",
    "interaction": "Routed minus plain with an optimisation, minus the same with the uniform one, of the same seed: at "
    "zero what the two change adds up, below it they lower the loss more together than in sum, above it less",
}
_READING = (
    "Small dots are seeds, large ones their mean with a 95 % interval (Student's, from ten seeds on by resampling). "
)
_COLUMNS = 4
_LEGEND_COLUMNS = 6
_PAGE_INCHES = 10.8
_MOST_ABOVE = 1.5
"""How far above nearly all values (99 %) a panel of curves reaches at most: one run that explodes, or the first
validation of an untrained network, would flatten all others."""
_MARGIN = 0.03


def grid_figures(frame: pd.DataFrame, curves: pd.DataFrame) -> list[ReportFigure]:
    """All figures that the grid has data for.

    Args:
        frame: `grid.grid_frame`.
        curves: `frames.curves_frame` of the same runs.
    """
    made = [loss_figure(frame), *(effects_figure(frame, effect) for effect in EFFECT_FIGURES), fidelity_figure(frame)]
    return [figure for figure in [*made, curves_figure(frame, curves)] if figure is not None]


def loss_figure(frame: pd.DataFrame) -> ReportFigure:
    """Final losses of all cells: overall, at low and at high noise."""
    figure = _cells_figure(frame, list(LOSSES), LOSS_WORDS)
    return ReportFigure(
        "grid_loss",
        "Final validation loss of every cell",
        f"{_READING}The dashed line is the mean of the first cell. Seeds differ in level together: judge differences "
        "by the figures of differences, not by how far the intervals here overlap.",
        figure,
    )


def fidelity_figure(frame: pd.DataFrame) -> ReportFigure | None:
    """Measures of the samples of all cells; None if none was measured."""
    measured = [name for name in FIDELITY_WORDS if name in fidelity_columns(frame) and frame[name].notna().any()]
    if not measured:
        return None
    return ReportFigure(
        "grid_fidelity",
        "How close the samples are to real images",
        f"{_READING}Lower is better for distances, higher for precision and recall. The dashed line is the mean of the "
        "first cell.",
        _cells_figure(frame, measured, FIDELITY_WORDS),
    )


def effects_figure(frame: pd.DataFrame, effect: Effect) -> ReportFigure | None:
    """One kind of difference of all cells, in the three losses; None if there is none."""
    name, title = EFFECT_FIGURES[effect]
    routings, optimisations = grid_axes(frame)
    first = base_choice(routings, PLAIN), base_choice(optimisations, UNIFORM)
    found = {quantity: seed_effects(frame, quantity) for quantity in LOSSES}
    shown = found["val_loss"].loc[found["val_loss"]["effect"] == effect]
    if shown.empty:
        return None
    cells = shown[ROUTING].nunique() * shown[OPTIMISATION].nunique()
    figure, axes = panels(1, len(LOSSES), height=grid_height(cells))
    for ax, quantity in zip(axes[0], LOSSES, strict=True):
        own = frame[(frame[ROUTING] == first[0]) & (frame[OPTIMISATION] == first[1])]
        unit = float(own[quantity].mean()) if len(own) else np.nan
        by_seed, intervals = _in_units(found[quantity], unit)
        of = f"{method_name(first[0])} with {method_name(first[1])}"
        in_units = "" if np.isnan(unit) else f", in % of the final loss\nof {of}"
        plot_grid_effects(
            intervals,
            by_seed,
            effect,
            title=LOSS_WORDS[quantity],
            xlabel=f"difference{in_units}",
            formatter=PercentFormatter(1.0) if in_units else None,
            legend=False,
            ax=ax,
        )
        ax.tick_params(labelleft=ax is axes[0][0])
    better = "" if effect == "interaction" else "Below zero is better. "
    _name_routings(figure, list(dict.fromkeys(shown[ROUTING])))
    return ReportFigure(
        name,
        title,
        f"{_CAPTIONS[effect]}. {better}{_READING}A star: significant at a false discovery rate of 5 % over all "
        "comparisons of the grid in this loss, with at least three seeds.",
        figure,
    )


def curves_figure(frame: pd.DataFrame, curves: pd.DataFrame) -> ReportFigure | None:
    """Validation loss over training: a panel for each optimisation, a colour for each routing."""
    routings, optimisations = grid_axes(frame)
    cells = frame.set_index("run")[[ROUTING, OPTIMISATION]].astype(str)
    own = curves[(curves["metric"] == frames.VAL_LOSS) & curves["run"].isin(cells.index)]
    own = own.assign(method=own["run"].map(cells[ROUTING]).replace(PLAIN, BASELINE))
    by_optimisation = dict(tuple(own.groupby(own["run"].map(cells[OPTIMISATION]))))
    shown = [optimisation for optimisation in optimisations if optimisation in by_optimisation]
    finite = own["value"][np.isfinite(own["value"])]
    if not shown or finite.empty:
        return None
    columns = min(_COLUMNS, len(shown))
    figure, axes = panels(-(-len(shown) // columns), columns, width=2.8, height=2.5)
    low, high = _curve_limits(finite)
    for ax, optimisation in zip(axes.flat, shown, strict=False):
        aligned = convergence.aligned_curves(by_optimisation[optimisation], frames.VAL_LOSS)
        plot_curves(
            aligned, mean=convergence.mean_curves(aligned), title=method_name(optimisation), is_loss=False, ax=ax
        )
        scale_losses(ax, (low, high))
        ax.set_ylim(low, high)
        ax.get_legend().remove()
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    keep_outer_axes(axes)
    _name_routings(figure, routings)
    return ReportFigure(
        "grid_curves",
        "Validation loss during training",
        "A panel for each optimisation, all on one scale: thin lines are seeds, thick ones their mean."
        + f" Curves above {high:.3g} leave the panel." * bool((own["value"] > high).any()),
        figure,
    )


def _curve_limits(values: pd.Series) -> tuple[float, float]:
    """Ends of a value axis that holds all of the finite values, but for outliers far above the others."""
    highest = min(float(values.max()), _MOST_ABOVE * float(values.quantile(0.99)))
    return (1 - _MARGIN) * float(values.min()), (1 + _MARGIN) * highest


def _cells_figure(frame: pd.DataFrame, quantities: list[str], words: dict[str, str]) -> Figure:
    columns = 2 if len(quantities) == 4 else min(3, len(quantities))
    routings, optimisations = grid_axes(frame)
    rows = -(-len(quantities) // columns)
    height = grid_height(len(routings) * len(optimisations))
    figure, axes = panels(rows, columns, width=_PAGE_INCHES / columns, height=height)
    for index, (ax, quantity) in enumerate(zip(axes.flat, quantities, strict=False)):
        cells = grid_cells(frame, quantity)
        level = float(cells["mean"].iloc[0])
        shown = None if np.isnan(level) else level
        plot_grid(cells, frame, quantity, level=shown, xlabel="", title=words[quantity], legend=False, ax=ax)
        ax.tick_params(labelleft=index % columns == 0)
    for ax in axes.flat[len(quantities) :]:
        ax.set_axis_off()
    _name_routings(figure, routings)
    return figure


def _in_units(by_seed: pd.DataFrame, unit: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`seed_effects` and their intervals in units of a value, which changes no test."""
    scaled = by_seed.assign(value=by_seed["value"] / (1.0 if np.isnan(unit) else unit))
    return scaled, effect_intervals(scaled)


def _name_routings(figure: Figure, routings: list[str]) -> None:
    marks = [
        Line2D([], [], color=routing_colour(routing), marker="o", markersize=6, linewidth=1.6) for routing in routings
    ]
    names = [method_name(routing) for routing in routings]
    figure.legend(
        marks, names, loc="outside lower center", ncols=min(_LEGEND_COLUMNS, len(names)), fontsize=9, frameon=False
    )
