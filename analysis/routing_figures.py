"""The figures about routing: with whom tasks share channels, how often each is used, and how far their sets overlap."""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis import activations, affinity, grouping, routing_budget
from analysis.methods import method_name
from analysis.panels import ReportFigure, Runs, keep_outer_labels, panels
from analysis.plots.channel_shares import plot_routing_budget
from analysis.plots.channels import plot_channel_frequency
from analysis.plots.matrices import plot_overlap
from analysis.plots.style import method_colour


def routing_budget_figure(runs: Runs) -> ReportFigure:
    """With whom each task shares the channels that it uses, and how often each channel is used, for each method."""
    by_method = grouping.group_by_method(runs)
    figure, axes = panels(2, len(by_method), height=3.2)
    for column, (method, own) in enumerate(by_method.items()):
        used, allowed = [routing_budget.measured_use(run) for run in own], [routing_budget.mask_use(run) for run in own]
        budget, limit = (grouping.mean_over_runs([_budget(use) for use in uses]) for uses in (used, allowed))
        plot_routing_budget(
            budget["per_timestep"],
            allowed=limit["per_timestep"].sum("group"),
            title=f"{method_name(method)}: turnover {float(limit['turnover'].mean()):.1%}",
            legend=False,
            ax=axes[0][column],
        )
        frequencies = (routing_budget.channel_frequency(use[0]) for use in (used, allowed))
        plot_channel_frequency(*frequencies, colour=method_colour(method), ax=axes[1][column])
    for ax in axes[:, 1:].ravel():
        ax.set_ylabel("")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return ReportFigure(
        "routing_budget",
        "The routing budget: shared and own channels",
        "Top: the channels that a timestep of each interval uses, by who else uses them (mean over blocks and seeds); "
        "the black line is how many the mask allows. Turnover: the share of channels that one timestep has and another "
        "one of the same interval has not. A plain model shares everything with all. DTR keeps most channels for all "
        "timesteps and moves a few: look how many an interval has for itself, and at which noise. Random routing gives "
        "no interval anything of its own, yet changes the channels with every timestep. Bottom: at how many timesteps "
        "each channel is used (colour, a line for each block of the first seed) and allowed (grey)."
        f"{_adherence(by_method)}",
        figure,
    )


def _adherence(by_method: dict[str, list[xr.Dataset]]) -> str:
    """A sentence for each routed method on how far use follows the mask."""
    said = ""
    for method, own in by_method.items():
        found = [routing_budget.mask_adherence(run) for run in own if "mask" in run]
        if found:
            used, outside = (
                np.mean([float(each[name].mean()) for each in found]) for name in ("used_of_allowed", "outside")
            )
            said += (
                f" {method_name(method)}: intervals use {used:.1%} of the channels that they may use at any timestep; "
            )
            said += f"{outside:.2%} of their energy lies on other channels." if outside else "no others carry energy."
    return said


def channel_overlap_figure(runs: Runs) -> ReportFigure:
    """What masks let two tasks share, which channels both use, and how much of their energy lies in the same ones."""
    by_method = grouping.group_by_method(runs)
    figure, axes = panels(3, len(by_method), height=3.7, square=True)
    for column, (method, own) in enumerate(by_method.items()):
        name, last = method_name(method), column == len(by_method) - 1
        energies = [activations.pooled_energy(run) for run in own]
        masks = grouping.mean_over_runs([_mask_overlap(run) for run in own])
        words = "masks" if any("mask" in run for run in own) else "no mask"
        plot_overlap(masks, title=f"{name}: {words}", colorbar=last, ax=axes[0][column])
        used = grouping.mean_over_runs([activations.active_overlap(energy) for energy in energies])
        plot_overlap(used, title=f"{name}: channels in use", colorbar=last, ax=axes[1][column])
        shared = grouping.mean_over_runs([activations.energy_overlap(energy) for energy in energies])
        plot_overlap(shared, title=f"{name}: energy", colorbar=last, ax=axes[2][column])
    keep_outer_labels(axes)
    return ReportFigure(
        "channel_overlap",
        "Which intervals share channels",
        "Top: overlap of the masks of two timesteps (Jaccard index), mean over all pairs of timesteps of two "
        "intervals. Middle: the same of the sets of channels that two intervals use at any of their timesteps. "
        "Bottom: the part of two intervals' energy that lies in the same channels, which noise lowers. One scale; "
        "means over blocks and seeds, last quarter of training. Look whether intervals that the masks set apart "
        "(top) carry their energy in different channels (bottom) more than those of the plain model do.",
        figure,
    )


def _mask_overlap(run: xr.Dataset) -> xr.DataArray:
    """`affinity.mask_overlap`, 1 everywhere for a plain run."""
    return affinity.mask_overlap(run) if "mask" in run else activations.active_overlap(routing_budget.mask_use(run))


def _budget(use: xr.DataArray) -> xr.Dataset:
    """The budget as shares of each block's channels, mean over blocks."""
    budget = routing_budget.routing_budget(use)
    return (budget / budget["width"]).mean("block")
