"""The figures of a comparison: statistics in, panels out, each with a caption that says what to look for."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from analysis import activations, affinity, conflict, convergence, frames, gramians
from analysis.methods import method_name, ordered, reference_method
from analysis.plots.channels import plot_channel_usage, plot_effective_channels
from analysis.plots.curves import plot_conflict_rate, plot_curves
from analysis.plots.intervals import plot_interval_change, plot_interval_loss
from analysis.plots.matrices import plot_conflict_matrix, plot_overlap

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


def report_figures(runs: Runs, curves: pd.DataFrame) -> list[ReportFigure]:
    """All figures that these runs have data for, in the order of the report.

    Args:
        runs: What was compared; all must measure the same intervals.
        curves: `frames.curves_frame` of it.
    """
    makers: list[tuple[str, Callable[[Runs], ReportFigure | None]]] = [
        ("val_loss", lambda _: curves_figure(curves)),
        ("val_loss", intervals_figure),
        ("gramian", conflict_figure),
        ("gramian", lambda usable: conflict_rate_figure(usable, curves)),
        ("gramian", affinity_figure),
        ("activation_mean_square", channels_figure),
        ("activation_mean_square", effective_channels_figure),
    ]
    made = [maker(usable) for variable, maker in makers if (usable := [run for run in runs if variable in run])]
    return [figure for figure in made if figure is not None]


def curves_figure(curves: pd.DataFrame) -> ReportFigure:
    """Validation loss over steps: overall, at low and at high noise."""
    panels = (
        (frames.VAL_LOSS, "all timesteps"),
        (frames.LOW_NOISE, "low noise: first quarter of T"),
        (frames.HIGH_NOISE, "high noise: last quarter of T"),
    )
    figure, axes = _panels(1, len(panels), height=3.2)
    for ax, (metric, title) in zip(axes[0], panels, strict=True):
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
    figure, axes = _panels(1, 1 if changes.empty else 2, width=5.2, height=3.8)
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


def conflict_figure(runs: Runs) -> ReportFigure:
    """Gradient cosine between intervals for each method, plain above corrected."""
    methods = ordered(run.attrs["method"] for run in runs)
    figure, axes = _panels(2, len(methods), height=3.7, square=True)
    matrices = {method: _cosines([run for run in runs if run.attrs["method"] == method]) for method in methods}
    limit = _colour_limit([matrix for plain, corrected, _ in matrices.values() for matrix in (plain, corrected)])
    for column, method in enumerate(methods):
        plain, corrected, significant = matrices[method]
        for row, (matrix, words) in enumerate(((plain, "plain"), (corrected, "noise-corrected"))):
            plot_conflict_matrix(
                matrix,
                significant=significant,
                limit=limit,
                title=f"{method_name(method)}, {words}",
                colorbar=column == len(methods) - 1,
                ax=axes[row][column],
            )
    _keep_outer_labels(axes)
    return ReportFigure(
        "conflict_matrix",
        "Which timesteps help and which fight each other",
        "Cosine between the gradients of the intervals' losses over all parameters, averaged over all probes and "
        "seeds (probes with large gradients, mostly early ones, weigh most). Blue pairs help each other, red pairs "
        "conflict; a dot marks pairs that differ from zero (false discovery rate 5 %). The plain cosine (top) is "
        "drawn towards zero by sampling noise; the corrected one (bottom) is not, and is hatched where a gradient "
        "cannot be told from noise: there, nothing can be said. Corrected cosines are estimates and may exceed 1.",
        figure,
    )


def _cosines(runs: Runs) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """Plain cosine, corrected cosine (NaN everywhere without halves) and significance of runs of one method."""
    gramian, count = gramians.pool_runs(runs)
    tasks = conflict.task_gramian(gramian, count)
    plain = conflict.cosine(tasks.mean(gramians.STEP))
    halved = gramian.sizes["half"] > 1
    corrected = conflict.corrected_cosine(gramian, count)["cosine"] if halved else plain * np.nan
    return plain, corrected, conflict.significant_pairs(tasks)


def conflict_rate_figure(runs: Runs, curves: pd.DataFrame) -> ReportFigure:
    """Conflict rate over steps with its null band."""
    aligned = convergence.aligned_curves(curves, frames.CONFLICT_RATE)
    gramian, count = gramians.pool_runs(runs[:1])
    rate = conflict.conflict_rate(conflict.task_gramian(gramian, count))
    figure, axes = _panels(1, 1, width=6.5, height=3.4)
    mean = convergence.mean_curves(aligned)
    plot_conflict_rate(aligned, mean=mean, null_error=float(rate["null_error"]), ax=axes[0][0])
    return ReportFigure(
        "conflict_rate",
        "Conflict over training",
        "Share of interval pairs whose gradients point against each other, probe by probe. Gradients that are pure "
        "noise give 0.5; inside the grey band a single probe says nothing. Look for a lasting departure from 0.5. "
        "The ± of the rate is its standard error over the probes within these runs, not a spread over seeds.",
        figure,
    )


def affinity_figure(runs: Runs) -> ReportFigure | None:
    """Mask overlap of a routed run beside the gradient affinity of the reference; None without a routed run."""
    routed = next((run for run in runs if run.attrs["method"] == "dtr" and "mask" in run), None)
    routed = routed or next((run for run in runs if "mask" in run), None)
    if routed is None:
        return None
    reference = reference_method(run.attrs["method"] for run in runs)
    _, gradient, _ = _cosines([run for run in runs if run.attrs["method"] == reference])
    overlap = affinity.mask_overlap(routed)
    figure, axes = _panels(1, 2, width=4.6, height=4.6, square=True)
    plot_conflict_matrix(
        gradient, limit=_colour_limit([gradient]), title=f"gradient cosine, {method_name(reference)}", ax=axes[0][0]
    )
    plot_overlap(overlap, title=f"mask overlap, {method_name(routed.attrs['method'])}", ax=axes[0][1])
    return ReportFigure(
        "affinity",
        "Does the routing share channels between tasks that agree?",
        "Left: noise-corrected gradient cosine of the intervals in the reference model. Right: how many channels the "
        "routing lets two intervals share (Jaccard index of their masks). If routing follows affinity, both fall off "
        f"in the same places. {_agreement(gradient, overlap)}",
        figure,
    )


def _agreement(gradient: xr.DataArray, overlap: xr.DataArray) -> str:
    try:
        found = affinity.rank_correlation(gradient, overlap, permutations=1999)
    except ValueError:
        return "Too few pairs have a defined cosine to correlate the two."
    return (
        f"Their rank correlation over {found.pairs} pairs is {found.correlation:.2f} (permutation p = "
        f"{found.p_value:.3g}); neighbouring intervals are alike in both, so a positive value alone is no proof."
    )


def channels_figure(runs: Runs) -> ReportFigure:
    """Channel energy by task in the middle block, for the first run of each method."""
    methods = ordered(run.attrs["method"] for run in runs)
    figure, axes = _panels(1, len(methods), height=3.0)
    for column, method in enumerate(methods):
        energy = _last_energy(next(run for run in runs if run.attrs["method"] == method))
        block = str(energy["block"].values[energy.sizes["block"] // 2])
        shown = energy.sel(block=block)
        plot_channel_usage(
            shown / shown.mean("channel"),
            title=f"{method_name(method)}, {block}",
            colorbar=column == len(methods) - 1,
            ax=axes[0][column],
        )
    _keep_outer_labels(axes)
    return ReportFigure(
        "channels",
        "Who uses which channels",
        "Energy of each channel at the input of the middle block's branches while each interval is processed (first "
        "seed, end of training); white is unused. Routing shows as a band that moves with t (DTR), or thins every "
        "channel alike (random routing, since its masks change with every timestep).",
        figure,
    )


def effective_channels_figure(runs: Runs) -> ReportFigure:
    """Effective share of channels by task and method."""
    methods = ordered(run.attrs["method"] for run in runs)
    shares = []
    for method in methods:
        own = [_last_energy(run) for run in runs if run.attrs["method"] == method]
        share = [activations.effective_channels(energy) / energy.notnull().sum("channel") for energy in own]
        shares.append(sum(share[1:], share[0]).mean("block") / len(share))
    figure, axes = _panels(1, 1, width=6.0, height=3.8)
    plot_effective_channels(xr.concat(shares, pd.Index(methods, name="method")), ax=axes[0][0])
    return ReportFigure(
        "effective_channels",
        "How many channels carry a task",
        "Effective share of channels at the branches' input (participation ratio of their energies: 1 if all channels "
        "carry the same energy, 1/C if one carries all), mean over blocks and seeds. Look for intervals that live in "
        "few channels.",
        figure,
    )


def _last_energy(run: xr.Dataset) -> xr.DataArray:
    """Mean square (block, task, channel) of what the blocks' branches read, at the end of training."""
    return run["activation_mean_square"].isel(activation_step=-1, drop=True).sel(site="input", drop=True)


def _panels(
    rows: int, columns: int, width: float = _PANEL_INCHES, height: float = _PANEL_INCHES, square: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure outside pyplot's registry, so that nobody must close it, and its axes (rows, columns)."""
    figure = Figure(figsize=(columns * width, rows * height), layout="compressed" if square else "constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _keep_outer_labels(axes: np.ndarray) -> None:
    for (row, column), ax in np.ndenumerate(axes):
        if column:
            ax.set_ylabel("")
        if row < len(axes) - 1:
            ax.set_xlabel("")


def _colour_limit(matrices: Sequence[xr.DataArray]) -> float:
    """The largest off-diagonal magnitude, rounded up to a tenth, between 0.2 and 1: one scale for a whole figure."""
    largest = 0.0
    for matrix in matrices:
        off = np.abs(matrix.values[~np.eye(matrix.sizes["task"], dtype=bool)])
        largest = max(largest, float(off[np.isfinite(off)].max(initial=0.0)))
    return float(np.clip(np.ceil(10 * largest) / 10, 0.2, 1.0))
