"""The figures about convergence: loss over training and its cost, who arrives when, how much faster, at which noise."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import Formatter, PercentFormatter, StrMethodFormatter

from analysis import convergence, frames
from analysis.axes import Axis, known_axes
from analysis.convergence_summary import EARLIER_SHARE
from analysis.interval_convergence import (
    NEUTRAL,
    Quantity,
    interval_convergence,
    interval_metrics,
    relative_differences,
)
from analysis.methods import method_name, ordered, reference_method
from analysis.plots.convergence import plot_arrival_profile, plot_interval_effects, plot_speed_up
from analysis.plots.curves import plot_curves
from analysis.plots.intervals import plot_interval_change, plot_interval_loss
from analysis.report.panels import ReportFigure, Runs, keep_outer_labels, panels

_PARTS = (
    (frames.VAL_LOSS, "all timesteps"),
    (frames.LOW_NOISE, "low noise: first quarter of T"),
    (frames.HIGH_NOISE, "high noise: last quarter of T"),
)
_COST_TITLES: dict[Axis, str] = {
    "samples": "at equal samples",
    "seconds": "at equal training time",
    "flops": "at equal operations",
}
_COLUMNS = 4
_BAND_WORDS = (
    "The band is the range of the seeds while these are fewer than 10 and every one is drawn; from 10 on it is a 95 % "
    "bootstrap interval of the mean over whole runs."
)


def curves_figure(curves: pd.DataFrame) -> ReportFigure:
    """Validation loss over steps: overall, at low and at high noise."""
    figure, axes = panels(1, len(_PARTS), height=3.2)
    for ax, (metric, title) in zip(axes[0], _PARTS, strict=True):
        _draw(curves, metric, "step", title, ax)
    keep_outer_labels(axes)
    _keep_first_legend(axes)
    return ReportFigure(
        "validation_loss",
        "Validation loss during training",
        "Mean unweighted loss on held-out images at fixed noise and timesteps. Thin lines are single seeds, thick "
        f"lines their mean. {_BAND_WORDS} Look whether the methods' bundles of seeds separate, and by the end or only "
        "on the way; the value axes differ between panels.",
        figure,
    )


def cost_figure(curves: pd.DataFrame) -> ReportFigure | None:
    """Validation loss against what the steps cost; None if all runs pay the same for a step, or it is not known."""
    validated = curves[curves["metric"] == frames.VAL_LOSS]
    shown = [axis for axis in known_axes(validated) if axis == "seconds" or _price_differs(validated, axis)]
    if not shown:
        return None
    figure, axes = panels(1, len(shown), width=5.2, height=3.4)
    for ax, axis in zip(axes[0], shown, strict=True):
        _draw(curves, frames.VAL_LOSS, axis, _COST_TITLES[axis], ax)
    keep_outer_labels(axes)
    _keep_first_legend(axes)
    return ReportFigure(
        "validation_loss_by_cost",
        "The same at equal cost",
        "Validation loss over all timesteps against what training cost: time spent in training steps (validation and "
        "sampling left out), and samples or floating-point operations where runs differ in them per step. Look whether "
        "a method that is ahead at equal steps still is; means and bands end with the first run to end. Time depends "
        "on what else the machine did: compare it only between runs on the same, quiet one.",
        figure,
    )


def _price_differs(curves: pd.DataFrame, axis: Axis) -> bool:
    price = curves[axis] / curves["step"]
    return axis != "step" and bool(price.max() > price.min() * (1 + 1e-9))


def interval_curves_figure(curves: pd.DataFrame, shown_intervals: int = 16) -> ReportFigure | None:
    """Validation loss of each timestep interval over steps; None if there are no intervals.

    Args:
        curves: `frames.curves_frame`.
        shown_intervals: How many to draw at most, evenly from low to high noise.
    """
    metrics = list(interval_metrics(curves).items())
    if not metrics:
        return None
    chosen = np.linspace(0, len(metrics) - 1, min(shown_intervals, len(metrics))).round().astype(int)
    columns = min(_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = panels(rows, columns, width=2.9, height=2.5)
    for ax, at in zip(axes.flat, chosen, strict=False):
        label, metric = metrics[at]
        _draw(curves, metric, "step", f"t = {label.removeprefix('t')}", ax)
    for ax in axes.flat[len(chosen) :]:
        ax.set_axis_off()
    keep_outer_labels(axes)
    _keep_first_legend(axes)
    return ReportFigure(
        "validation_loss_by_interval",
        "Every timestep interval during training",
        "Validation loss of each interval, from low noise (first) to high noise (last), as above; value axes differ. "
        "Look for intervals in which the methods part early, in which they cross, and in which the loss rises again: "
        "there, the others may be learning at its cost.",
        figure,
    )


def intervals_figure(runs: Runs) -> ReportFigure:
    """Final loss by interval, and relative to the reference method."""
    losses = frames.interval_losses(runs)
    reference = reference_method(losses["method"])
    changes = frames.interval_changes(losses, reference)
    figure, axes = panels(1, 1 if changes.empty else 2, width=5.2, height=3.8)
    plot_interval_loss(losses, runs[0], ax=axes[0][0])
    if not changes.empty:
        plot_interval_change(changes, runs[0], ax=axes[0][1])
        axes[0][1].set_ylabel(f"loss relative to {method_name(reference)}")
    return ReportFigure(
        "interval_loss",
        "Where on the noise axis the difference lies",
        "Left: validation loss of each timestep interval at the end of training, one line per run. Right: the same "
        f"relative to {method_name(reference)} with the same seed; dots are seeds, bars their mean, below zero is "
        "better. A bar whose dots lie on both sides of zero is not a difference.",
        figure,
    )


def interval_effects_figure(runs: Runs, curves: pd.DataFrame) -> ReportFigure | None:
    """Differences, speed-up and probability of improvement of every interval; None without two pairs of runs.

    Args:
        runs: What was compared.
        curves: `frames.curves_frame` of it.
    """
    reference = reference_method(curves["method"])
    table = relative_differences(interval_convergence(curves, reference, share=EARLIER_SHARE))
    if table.empty or table["pairs"].max() < 2:
        return None
    name = method_name(reference)
    percent, times = PercentFormatter(1.0), StrMethodFormatter("{x:g}x")
    parts: tuple[tuple[Quantity, str, str, Formatter], ...] = (
        ("difference", "final loss", f"relative to {name}", percent),
        ("area_difference", "loss averaged over training", f"relative to {name}", percent),
        ("speed_up", f"speed-up to {name}'s loss at {EARLIER_SHARE:.0%} of its steps", "times as fast", times),
        ("probability", "probability of improvement", f"ends lower than {name}", percent),
    )
    figure, axes = panels(2, 2, width=5.2, height=3.7)
    for ax, (quantity, title, ylabel, formatter) in zip(axes.flat, parts, strict=True):
        plot_interval_effects(
            table[table["quantity"] == quantity],
            runs[0],
            neutral=NEUTRAL[quantity],
            title=title,
            ylabel=ylabel,
            formatter=formatter,
            limits=(-0.03, 1.12) if quantity == "probability" else None,
            ax=ax,
        )
    entries = axes[0][0].get_legend_handles_labels()
    for ax in axes.flat:
        ax.get_legend().remove()
    figure.legend(*entries, loc="outside lower center", ncols=len(entries[1]), fontsize=9, frameon=False)
    return ReportFigure(
        "interval_effects",
        "Which intervals converge better, and how sure that is",
        f"Every interval against {name} with the same seed: mean over seeds with a 95 % interval (top, and for the "
        "speed-up on logarithms; Student's, from ten seeds on by resampling runs), or share of seeds with its exact "
        "interval (bottom right). Bars are those of a single comparison; a star marks what is significant at a false "
        "discovery rate of 5 % over all intervals of a method. Below zero, above 1x and above 50 % are better. A bar "
        "that leaves the panel goes on. Where a run did not arrive, a triangle is the most (▽) or least (△) that the "
        "mean speed-up can be, a ring its median. "
        f"{_few(table)}",
        figure,
    )


def _few(table: pd.DataFrame) -> str:
    pairs = int(table["pairs"].min())
    smallest = 0.5 ** (pairs - 1)
    if smallest <= 0.05:
        return ""
    return f"With {pairs} seeds no probability can be significant: its sign test reaches p = {smallest:.3g} at best."


def arrivals_figure(curves: pd.DataFrame) -> ReportFigure | None:
    """Fraction of runs that have arrived at the reference's loss, late and at the end of its training."""
    reference = reference_method(curves["method"])
    shares = (EARLIER_SHARE, 1.0)
    reached = [convergence.steps_to_baseline(curves, frames.VAL_LOSS, reference, share=share) for share in shares]
    if reached[0]["method"].nunique() < 2:
        return None
    name = method_name(reference)
    titles = (f"to {name}'s loss at {EARLIER_SHARE:.0%} of its steps", f"to {name}'s final loss")
    figure, axes = panels(1, len(shares), width=5.2, height=3.4)
    for ax, own, title in zip(axes[0], reached, titles, strict=True):
        plot_arrival_profile(convergence.arrival_profile(own), reference=reference, title=title, ax=ax)
    keep_outer_labels(axes)
    _keep_first_legend(axes)
    return ReportFigure(
        "arrival_profile",
        "How many runs get there, and when",
        f"Share of each method's runs that have come down to the loss that {name} has with the same seed at three "
        "quarters of its training (left) and at its end (right), with pointwise 95 % intervals (Kaplan and Meier; "
        f"log-log). {name}, dashed, arrives when it does by construction. A cross is a run that ended without having "
        "arrived: it is counted, not left out. A line further left and higher is faster; with few seeds the intervals "
        "are wide, and a difference of one run is none.",
        figure,
    )


def speed_up_figure(curves: pd.DataFrame) -> ReportFigure | None:
    """Speed-up against the threshold, in steps and, if it was measured, in training time; None without a pair."""
    reference = reference_method(curves["method"])
    validated = curves[curves["metric"] == frames.VAL_LOSS]
    shown: list[Axis] = [axis for axis in known_axes(validated) if axis in ("step", "seconds")]
    found = {axis: _speed_ups(validated, reference, axis) for axis in shown}
    found = {axis: speed for axis, speed in found.items() if not speed.empty}
    if not found:
        return None
    figure, axes = panels(1, len(found), width=5.2, height=3.8)
    for ax, (axis, speed) in zip(axes[0], found.items(), strict=True):
        title = "in steps" if axis == "step" else "in training time"
        plot_speed_up(speed, reference=reference, title=title, ax=ax)
    keep_outer_labels(axes)
    _keep_first_legend(axes)
    name = method_name(reference)
    return ReportFigure(
        "speed_up",
        "How much faster, to which loss",
        f"How many times fewer steps (or seconds) a method needs than {name} with the same seed, to the loss that "
        f"{name} has there: geometric mean over seeds, with pointwise 95 % intervals of its logarithm. Thresholds "
        f"are fixed by {name} alone, from where both are followed to its final loss at the right. Where a run did not "
        "arrive there is no mean: a triangle is the most (▽) or least (△) that it can be, a ring the median if the "
        "others determine it. Look whether the line stays clear of 1 to the end, or is ahead only early on.",
        figure,
    )


def _speed_ups(curves: pd.DataFrame, reference: str, axis: Axis) -> pd.DataFrame:
    others = [method for method in ordered(curves["method"]) if method != reference]
    pieces = [convergence.speed_up_curve(curves, frames.VAL_LOSS, method, reference, axis=axis) for method in others]
    pieces = [piece for piece in pieces if not piece.empty]
    return pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame()


def _draw(curves: pd.DataFrame, metric: str, axis: Axis, title: str, ax: Axes) -> None:
    aligned = convergence.aligned_curves(curves, metric, axis)
    bands = convergence.curve_bands(aligned)
    plot_curves(aligned, mean=convergence.mean_curves(aligned), bands=bands, title=title, ax=ax)


def _keep_first_legend(axes: np.ndarray) -> None:
    for ax in axes.flat[1:]:
        if ax.get_legend() is not None:
            ax.get_legend().remove()
