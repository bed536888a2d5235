"""The figures of a comparison: statistics in, panels out, each with a caption that says what to look for."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

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
from analysis.convergence_figures import (
    arrivals_figure,
    cost_figure,
    curves_figure,
    interval_curves_figure,
    interval_effects_figure,
    intervals_figure,
    speed_up_figure,
)
from analysis.method_channels import method_channels
from analysis.panels import ReportFigure, ReportSection, Runs
from analysis.routing_figures import channel_overlap_figure, routing_budget_figure

_CHANNELS = "activation_mean_square"
Maker = Callable[[Runs], ReportFigure | None]


def report_sections(runs: Runs, curves: pd.DataFrame) -> list[ReportSection]:
    """All figures that these runs have data for, in the sections and the order of the report.

    Args:
        runs: What was compared; all must measure the same intervals.
        curves: `frames.curves_frame` of it.
    """
    channels = method_channels(runs)
    makers: dict[str, list[tuple[str, Maker]]] = {
        "Convergence": [
            ("val_loss", lambda _: curves_figure(curves)),
            ("val_loss", lambda _: cost_figure(curves)),
            ("val_loss", lambda _: arrivals_figure(curves)),
            ("val_loss", lambda _: speed_up_figure(curves)),
            ("val_loss", intervals_figure),
            ("val_loss", lambda usable: interval_effects_figure(usable, curves)),
            ("val_loss", lambda _: interval_curves_figure(curves)),
        ],
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
            (_CHANNELS, lambda _: channels_figure(channels)),
            (_CHANNELS, lambda _: channel_count_figure(channels)),
            (_CHANNELS, lambda _: effective_channels_figure(channels, curves)),
            (_CHANNELS, lambda _: effective_by_block_figure(channels)),
            (_CHANNELS, lambda _: specialisation_figure(channels)),
            (_CHANNELS, lambda _: routing_budget_figure(channels)),
            (_CHANNELS, lambda _: channel_overlap_figure(channels)),
        ],
    }
    sections = [ReportSection(title, _made(own, runs)) for title, own in makers.items()]
    return [section for section in sections if section.figures]


def _made(makers: list[tuple[str, Maker]], runs: Runs) -> list[ReportFigure]:
    """The figures whose variable some of the runs have, of these runs."""
    made = [maker(usable) for variable, maker in makers if (usable := [run for run in runs if variable in run])]
    return [figure for figure in made if figure is not None]
