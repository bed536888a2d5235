"""The figures of a comparison: statistics in, panels out, each with a caption that says what to look for."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import xarray as xr

from analysis import activations, convergence, frames
from analysis.conflict_figures import (
    affinity_figure,
    blocks_figure,
    conflict_figure,
    conflict_rate_figure,
    noise_figure,
    raw_vs_corrected_figure,
    update_figure,
)
from analysis.methods import method_name, ordered, reference_method
from analysis.panels import ReportFigure, Runs, keep_outer_labels, panels
from analysis.plots.channels import plot_channel_usage, plot_effective_channels
from analysis.plots.curves import plot_curves
from analysis.plots.intervals import plot_interval_change, plot_interval_loss


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
        ("gramian", raw_vs_corrected_figure),
        ("gramian", lambda usable: conflict_rate_figure(usable, curves)),
        ("gramian", blocks_figure),
        ("gramian", update_figure),
        ("gramian", noise_figure),
        ("gramian", affinity_figure),
        ("activation_mean_square", channels_figure),
        ("activation_mean_square", effective_channels_figure),
    ]
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


def channels_figure(runs: Runs) -> ReportFigure:
    """Channel energy by task in the middle block, for the first run of each method."""
    methods = ordered(run.attrs["method"] for run in runs)
    figure, axes = panels(1, len(methods), height=3.0)
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
    keep_outer_labels(axes)
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
        # Over blocks first: the runs of a method need not have the same ones.
        means = [of_run.mean("block") for of_run in share]
        shares.append(sum(means[1:], means[0]) / len(means))
    figure, axes = panels(1, 1, width=6.0, height=3.8)
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
