"""The figures of a comparison: statistics in, panels out, each with a caption that says what to look for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pandas as pd

from analysis.affinity_measures import affinities_by_method
from analysis.forked import forked_calls
from analysis.gramians import with_total
from analysis.method_channels import method_channels, prepare
from analysis.report.affinity_figures import affinity_figure, affinity_film_figure, agreement_figure
from analysis.report.channel_figures import (
    channel_count_figure,
    channels_figure,
    effective_by_block_figure,
    effective_channels_figure,
    specialisation_figure,
)
from analysis.report.cluster_figures import clusters_figure
from analysis.report.conflict_figures import (
    blocks_figure,
    conflict_figure,
    conflict_rate_figure,
    noise_figure,
    raw_vs_corrected_figure,
    update_figure,
)
from analysis.report.convergence_figures import (
    arrivals_figure,
    cost_figure,
    curves_figure,
    interval_curves_figure,
    interval_effects_figure,
    intervals_figure,
    speed_up_figure,
)
from analysis.report.many_methods import drawn_methods, verdict_of_many
from analysis.report.panels import AnyFigure, DrawnFigure, ReportFigure, ReportSection, Runs
from analysis.report.routing_figures import channel_overlap_figure, routing_budget_figure
from analysis.report.task_weight_figures import task_weights_figure
from analysis.report.timestep_figures import representation_figure
from analysis.report.transfer_figures import look_ahead_figure, measured_figure, measured_film_figure, sharing_figure
from analysis.summary import Verdict

_CHANNELS = "activation_mean_square"
Specialists = Mapping[str, Runs]
Maker = Callable[[Runs], ReportFigure | None]


def report_sections(
    runs: Runs, curves: pd.DataFrame, specialists: Specialists | None = None
) -> list[ReportSection[ReportFigure]]:
    """All figures that these runs have data for, in the sections and the order of the report.

    Of more methods than figures can hold, those of `many_methods.drawn_methods` are drawn.

    Args:
        runs: What was compared; all must measure the same intervals.
        curves: `frames.curves_frame` of it.
        specialists: By method, as of `specialists.usable_specialists`.
    """
    made = [(title, maker(usable)) for title, maker, usable in _planned(runs, curves, specialists or {})]
    return _sections([(title, figure) for title, figure in made if figure is not None])


def drawn_report(
    runs: Runs,
    summary: pd.DataFrame,
    curves: pd.DataFrame,
    *,
    specialists: Specialists | None = None,
    pdf: bool = False,
) -> tuple[Verdict, list[ReportSection[DrawnFigure]]]:
    """`many_methods.verdict_of_many` and `report_sections` as files: what takes longest in a report, side by side.

    Args:
        runs: What was compared; all must measure the same intervals.
        summary: `summary.summary_frame` of it.
        curves: `frames.curves_frame` of it.
        specialists: As of `report_sections`.
        pdf: Whether to draw PDF files, too.
    """

    def draw(title: str, maker: Maker, usable: Runs) -> tuple[str, DrawnFigure | None]:
        figure = maker(usable)
        return title, None if figure is None else figure.drawn(pdf)

    # From the end: the last figures take longest, and short ones fill what is left at the end.
    drawing = [functools.partial(draw, *planned) for planned in reversed(_planned(runs, curves, specialists or {}))]
    said, *made = forked_calls([functools.partial(verdict_of_many, runs, summary, curves), *drawing])
    return said, _sections([(title, figure) for title, figure in reversed(made) if figure is not None])


def _sections(made: list[tuple[str, AnyFigure]]) -> list[ReportSection[AnyFigure]]:
    titles = dict.fromkeys(title for title, _ in made)
    return [ReportSection(title, [figure for own, figure in made if own == title]) for title in titles]


def _planned(runs: Runs, curves: pd.DataFrame, specialists: Specialists) -> list[tuple[str, Maker, Runs]]:
    """Section, maker, and the runs that have the variable that the figure shows; without those that have none."""
    drawn = drawn_methods(run.attrs["method"] for run in runs)
    runs = [run for run in runs if run.attrs["method"] in drawn]
    curves = curves[curves["method"].isin(drawn)]
    specialists = {method: own for method, own in specialists.items() if method in drawn}
    channels = method_channels(runs)
    prepare(list(channels.values()))
    summed = [with_total(run) if "gramian" in run else run for run in runs]
    affinities = affinities_by_method(summed, specialists)
    makers: dict[str, list[tuple[str, Maker]]] = {
        "Convergence": _of_convergence(curves),
        "Multi-task optimisation": [("task_weight", task_weights_figure)],
        "Gradient conflict": [
            ("gramian", conflict_figure),
            ("gramian", raw_vs_corrected_figure),
            ("gramian", lambda usable: conflict_rate_figure(usable, curves)),
            ("gramian", lambda _: blocks_figure([run for run in runs if "gramian" in run])),
            ("gramian", update_figure),
            ("gramian", noise_figure),
        ],
        "Task affinity": [
            ("gramian", affinity_figure),
            ("gramian", affinity_film_figure),
            ("val_loss", lambda _: measured_figure(affinities)),
            ("val_loss", measured_film_figure),
            ("val_loss", look_ahead_figure),
            ("val_loss", lambda usable: sharing_figure(usable, specialists)),
            ("val_loss", representation_figure),
            ("val_loss", lambda _: agreement_figure(affinities)),
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
    return [
        (title, maker, usable)
        for title, own in makers.items()
        for variable, maker in own
        if (usable := [run for run in summed if variable in run])
    ]


def _of_convergence(curves: pd.DataFrame) -> list[tuple[str, Maker]]:
    return [
        ("val_loss", lambda _: curves_figure(curves)),
        ("val_loss", lambda _: cost_figure(curves)),
        ("val_loss", lambda _: arrivals_figure(curves)),
        ("val_loss", lambda _: speed_up_figure(curves)),
        ("val_loss", intervals_figure),
        ("val_loss", lambda usable: interval_effects_figure(usable, curves)),
        ("val_loss", lambda _: interval_curves_figure(curves)),
    ]
