"""The figures about what training on one interval does to the others: one step, many steps, a whole training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from scipy import stats

from analysis.affinity import significant_cells
from analysis.affinity_measures import FINE_TUNING, LOOK_AHEAD, REPRESENTATION
from analysis.grouping import group_by_method
from analysis.methods import method_name
from analysis.plots.affinity import plot_affinity, plot_affinity_film
from analysis.plots.look_ahead import plot_look_ahead
from analysis.plots.tasks import plot_task_values
from analysis.report.panels import ReportFigure, Runs, film_panels, keep_outer_axes, keep_outer_labels, panels
from analysis.significance import FALSE_DISCOVERY_RATE
from analysis.specialists import negative_transfer_gap, specialist_affinity
from analysis.transfer import first_order_slope, look_ahead_affinity, predicted_look_ahead, transfer_film
from analysis.uncertainty import ENOUGH_TO_CLAIM, mean_interval, mean_p_value
from lightning_modules.tracking import records

Affinities = Mapping[str, Mapping[str, xr.DataArray]]
_MEASURED = {LOOK_AHEAD: "look-ahead / own", FINE_TUNING: "fine-tuning / own", REPRESENTATION: "CKA"}
_LAST_CHECKPOINTS = 6


def measured_figure(affinities: Affinities) -> ReportFigure | None:
    """Look-ahead, fine-tuning and representation similarity of each method; None where none was measured.

    Args:
        affinities: By method and name, of `affinity_measures.affinities_by_method`.
    """
    found = {method: own for method, own in affinities.items() if any(name in own for name in _MEASURED)}
    names = [name for name in _MEASURED if any(name in own for own in found.values())]
    if not names:
        return None
    last_of_scale = {name != REPRESENTATION: name for name in names}.values()
    figure, axes = panels(len(found), len(names), height=3.8, square=True)
    for (row, column), ax in np.ndenumerate(axes):
        (method, own), name = list(found.items())[row], names[column]
        if name not in own:
            ax.set_axis_off()
            continue
        signed = name != REPRESENTATION
        plot_affinity(
            own[name],
            significant=significant_cells(own[name]) if signed else None,
            limit=1.0,
            signed=signed,
            title=f"{method_name(method)}: {_MEASURED[name]}",
            colorbar=name in last_of_scale,
            ax=ax,
        )
    keep_outer_axes(axes)
    return ReportFigure(
        "measured_affinity",
        "Who helps whom, measured by training on one interval",
        "Rows were trained on, columns are affected. Look-ahead: the share of an interval's loss that one step on "
        "another saves, relative to a step on itself (blue helps, red harms; the colour of ±1 stands for more, too). "
        "Fine-tuning: the same after many steps, so what it forgets shows as well. CKA: similarity of the "
        "representations, mean over blocks. A dot marks what differs from zero (false discovery rate 5 %; errors over "
        "the runs, or over draws of samples for one run). Hatched: undefined, in the columns of intervals whose own "
        "training did not help them beyond noise. Look for columns that everything helps, and for help that goes one "
        "way.",
        figure,
    )


def measured_film_figure(runs: Runs) -> ReportFigure | None:
    """Look-ahead of each method at several checkpoints; None if no method was measured at two."""
    films = {}
    for method, own in group_by_method([run for run in runs if "look_ahead_change" in run]).items():
        shared = set.intersection(*(set(run["look_ahead_step"].values.tolist()) for run in own))
        if len(shared) > 1:
            film = transfer_film(own, records.LOOK_AHEAD, relative=True)
            films[method] = film.isel(window=slice(-_LAST_CHECKPOINTS, None))
    if not films:
        return None
    first = next(iter(films.values()))
    figure, axes = film_panels(len(films), max(film.sizes["window"] for film in films.values()), first.sizes["task"])
    for ax, (method, film) in zip(axes[:, 0], films.items(), strict=True):
        plot_affinity_film(film, significant=significant_cells(film), limit=1.0, title=method_name(method), ax=ax)
    keep_outer_labels(axes)
    return ReportFigure(
        "measured_affinity_film",
        "How measured help changes during training",
        "The look-ahead of the figure above at each measured checkpoint (the last six at most): rows were trained on, "
        "columns, in the same order, are affected; relative to a step on the interval itself. A dot marks what differs "
        "from zero (false discovery rate 5 % over all checkpoints), hatched columns were not helped by their own step "
        "beyond noise. Look whether help narrows to the diagonal as training goes on.",
        figure,
    )


def look_ahead_figure(runs: Runs) -> ReportFigure | None:
    """Measured look-aheads against their first-order form; None if no run has both."""
    measured = [run for run in runs if "look_ahead_predicted" in run]
    by_method = group_by_method([run for run in measured if bool(run["look_ahead_predicted"].notnull().any())])
    if not by_method:
        return None
    pairs = {method: (look_ahead_affinity(own), predicted_look_ahead(own)) for method, own in by_method.items()}
    every = np.concatenate([values.values.ravel() for pair in pairs.values() for values in pair])
    limits = float(np.nanmin(every)), float(np.nanmax(every))
    figure, axes = panels(1, len(pairs), width=3.8, height=3.9, square=True)
    for column, (method, (real, first)) in enumerate(pairs.items()):
        plot_look_ahead(
            real,
            first,
            limits=limits,
            slope=_slope(by_method[method]),
            title=method_name(method),
            colorbar=column == len(pairs) - 1,
            ax=axes[0][column],
        )
    keep_outer_axes(axes)
    return ReportFigure(
        "look_ahead_prediction",
        "Does a step do what the gradients promise?",
        "Each point is an ordered pair of intervals: the share of one's loss that a real gradient step on the other "
        "saves (upwards, bars are standard errors) against what the inner product of their gradients predicts for the "
        "same samples and step (to the right); axes are logarithmic but for a stretch around zero. On the dashed "
        "diagonal the first order is all there is; below it curvature takes part of the gain back. The slope is that "
        "of a line through the origin, which the largest shares decide (with its 95 % interval over runs). If points "
        "leave the diagonal, do not read gradient affinities as help.",
        figure,
    )


def _slope(runs: Runs) -> str:
    interval = mean_interval([first_order_slope(run) for run in runs])
    spread = f" [{interval.low:.2f}, {interval.high:.2f}]" if np.isfinite(interval.low) else ""
    return f"slope {interval.estimate:.2f}{spread}"


def sharing_figure(runs: Runs, specialists: Mapping[str, Runs]) -> ReportFigure | None:
    """Negative-transfer gap of each method, and how far its specialists reach; None without specialists.

    Args:
        runs: What was compared.
        specialists: By method, as of `specialists.usable_specialists`.
    """
    shared = group_by_method(runs)
    gaps = {method: negative_transfer_gap(shared[method], alone) for method, alone in specialists.items()}
    if not gaps:
        return None
    figure, axes = panels(1, 1 + len(gaps), width=4.4, height=4.2, square=True)
    index = xr.DataArray(list(gaps), dims="method", name="method")
    values = xr.concat([gap[["gap", "low", "high"]] for gap in gaps.values()], index).rename(gap="value")
    plot_task_values(
        values,
        seeds=xr.concat([gap["by_seed"] for gap in gaps.values()], index, join="outer"),
        ylabel="loss of the specialist / shared - 1",
        title="negative-transfer gap",
        ax=axes[0][0],
    )
    for ax, (method, alone) in zip(axes[0][1:], specialists.items(), strict=True):
        reach = specialist_affinity(shared[method], alone)
        title = f"{method_name(method)}: loss saved by specialists"
        plot_affinity(reach, significant=significant_cells(reach), limit=1.0, signed=True, title=title, ax=ax)
    return ReportFigure(
        "negative_transfer",
        "Does sharing one network pay?",
        "Left: final validation loss of a specialist, trained on one interval alone, over the shared model's in that "
        "interval, minus 1. Above zero the other intervals help; below, they do harm (ANT's negative transfer). Dots "
        "are seeds, bars 95 % intervals over them. Right: what a specialist of the row's interval saves of the "
        "shared model's loss in each column; the colour of -1 stands for less, too, and off the diagonal most is far "
        "below zero, since what was learned on one interval carries only so far. A dot marks what differs from zero "
        f"(false discovery rate 5 %). {_harmed(gaps)}",
        figure,
    )


def _harmed(gaps: Mapping[str, xr.Dataset]) -> str:
    """Where the gap differs from zero at a false discovery rate over all intervals of a method, in words."""
    said = []
    for method, gap in gaps.items():
        seeds = gap.sizes["seed"]
        if seeds < ENOUGH_TO_CLAIM:
            said.append(f"{method_name(method)}: with {seeds} of the seeds paired, no gap can be told from chance.")
            continue
        by_seed = gap["by_seed"].transpose("seed", "task").values
        found = stats.false_discovery_control([mean_p_value(own) for own in by_seed.T]) <= FALSE_DISCOVERY_RATE
        sides = {"harmed": found & (gap["gap"].values < 0), "helped": found & (gap["gap"].values > 0)}
        words = [
            f"{word} at t {', '.join(str(name).removeprefix('t') for name in gap['interval'].values[where])}"
            for word, where in sides.items()
            if where.any()
        ]
        said.append(
            f"{method_name(method)} ({seeds} seeds): {' and '.join(words) or 'no interval is resolved'} "
            "(false discovery rate 5 % over the intervals)."
        )
    return " ".join(said)
