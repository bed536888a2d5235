"""The figures of a comparison: statistics in, panels out, each with a caption that says what to look for."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from analysis import convergence, frames
from analysis.affinity_figures import affinity_figure, affinity_film_figure, agreement_figure, measured_figure
from analysis.channel_figures import (
    channel_count_figure,
    channels_figure,
    effective_by_block_figure,
    effective_channels_figure,
    specialisation_figure,
)
from analysis.cluster_figures import clusters_figure
from analysis.conflict_figures import (
    blocks_figure,
    conflict_figure,
    conflict_rate_figure,
    noise_figure,
    raw_vs_corrected_figure,
    update_figure,
)
from analysis.methods import method_name, reference_method
from analysis.panels import ReportFigure, ReportSection, Runs, panels
from analysis.plots.curves import plot_curves
from analysis.plots.intervals import plot_interval_change, plot_interval_loss
from analysis.routing_figures import channel_overlap_figure, routing_budget_figure

Maker = Callable[[Runs], ReportFigure | None]


def report_sections(runs: Runs, curves: pd.DataFrame) -> list[ReportSection]:
    """All figures that these runs have data for, in the sections and the order of the report.

    Args:
        runs: What was compared; all must measure the same intervals.
        curves: `frames.curves_frame` of it.
    """
    makers: dict[str, list[tuple[str, Maker]]] = {
        "Convergence": [("val_loss", lambda _: curves_figure(curves)), ("val_loss", intervals_figure)],
        "Gradient conflict": [
            ("gramian", conflict_figure),
            ("gramian", raw_vs_corrected_figure),
            ("gramian", lambda usable: conflict_rate_figure(usable, curves)),
            ("gramian", blocks_figure),
            ("gramian", update_figure),
            ("gramian", noise_figure),
        ],
        "Task affinity": [
            ("gramian", affinity_figure),
            ("val_loss", measured_figure),
            ("gramian", affinity_film_figure),
            ("val_loss", agreement_figure),
            ("gramian", clusters_figure),
        ],
        "Channels": [
            ("activation_mean_square", channels_figure),
            ("activation_mean_square", channel_count_figure),
            ("activation_mean_square", lambda usable: effective_channels_figure(usable, curves)),
            ("activation_mean_square", effective_by_block_figure),
            ("activation_mean_square", specialisation_figure),
            ("activation_mean_square", routing_budget_figure),
            ("activation_mean_square", channel_overlap_figure),
        ],
    }
    sections = [ReportSection(title, _made(own, runs)) for title, own in makers.items()]
    return [section for section in sections if section.figures]


def _made(makers: list[tuple[str, Maker]], runs: Runs) -> list[ReportFigure]:
    """The figures whose variable some of the runs have, of these runs."""
    made = [maker(usable) for variable, maker in makers if (usable := [run for run in runs if variable in run])]
    return [figure for figure in made if figure is not None]


def curves_figure(curves: pd.DataFrame) -> ReportFigure:
    """Validation loss over steps: overall, at low and at high noise."""
    parts = (
        (frames.VAL_LOSS, "all timesteps"),
        (frames.LOW_NOISE, "low noise: first quarter of T"),
        (frames.HIGH_NOISE, "high noise: last quarter of T"),
    )
    figure, axes = panels(1, len(parts), height=3.2)
    for ax, (metric, title) in zip(axes[0], parts, strict=True):
        aligned = convergence.aligned_curves(curves, metric)
        plot_curves(aligned, mean=convergence.mean_curves(aligned), title=title, ax=ax)
    for ax in axes[0][1:]:
        ax.set_ylabel("")
        ax.get_legend().remove()
    return ReportFigure(
        "validation_loss",
        "Validation loss during training",
        "Mean unweighted loss on held-out images at fixed noise and timesteps. Thin lines are single seeds, thick "
        "lines their mean. Look whether the methods' bundles of seeds separate, and by the end or only on the way; "
        "the value axes differ between panels.",
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
