"""The figures about routing: with whom tasks share channels, how often each is used, and how far their sets overlap."""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr

from analysis import activations, affinity, grouping, routing_budget
from analysis.method_channels import MethodChannels
from analysis.methods import method_name
from analysis.plots.channel_shares import plot_routing_budget
from analysis.plots.channels import plot_channel_frequency
from analysis.plots.matrices import plot_overlap
from analysis.plots.style import method_colour
from analysis.report.panels import ReportFigure, keep_outer_axes, panels


def routing_budget_figure(channels: Mapping[str, MethodChannels]) -> ReportFigure:
    """With whom each task shares the channels that it uses, and how often each channel is used, for each method."""
    figure, axes = panels(2, len(channels), height=3.2)
    for column, (method, own) in enumerate(channels.items()):
        budget, limit = (_budget(use).mean("run") for use in (own.measured, own.allowed))
        plot_routing_budget(
            budget["per_timestep"],
            allowed=limit["per_timestep"].sum("group"),
            title=f"{method_name(method)}: turnover {float(limit['turnover'].mean()):.1%}",
            legend=False,
            ax=axes[0][column],
        )
        frequencies = (routing_budget.channel_frequency(use.isel(run=0)) for use in (own.measured, own.allowed))
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
        f"{_adherence(channels)}",
        figure,
    )


def _adherence(channels: Mapping[str, MethodChannels]) -> str:
    """A sentence for each routed method on how far use follows the mask."""
    said = ""
    for method, own in channels.items():
        if own.routed:
            found = routing_budget.adherence(own.energy(), own.allowed > 0)
            used, outside = (float(found[name].mean()) for name in ("used_of_allowed", "outside"))
            said += (
                f" {method_name(method)}: intervals use {used:.1%} of the channels that they may use at any timestep; "
            )
            said += f"{outside:.2%} of their energy lies on other channels." if outside else "no others carry energy."
    return said


def channel_overlap_figure(channels: Mapping[str, MethodChannels]) -> ReportFigure:
    """What masks let two tasks share, which channels both use, and how much of their energy lies in the same ones."""
    figure, axes = panels(3, len(channels), height=3.7, square=True)
    for column, (method, own) in enumerate(channels.items()):
        name, last = method_name(method), column == len(channels) - 1
        if own.routed:
            masks, words = grouping.mean_over_runs([affinity.mask_overlap(run) for run in own.runs]), "masks"
        else:
            masks, words = activations.active_overlap(own.allowed), "no mask"
        plot_overlap(masks, title=f"{name}: {words}", colorbar=last, ax=axes[0][column])
        used = activations.active_overlap(own.energy())
        plot_overlap(used, title=f"{name}: channels in use", colorbar=last, ax=axes[1][column])
        shared = activations.energy_overlap(own.energy())
        plot_overlap(shared, title=f"{name}: energy", colorbar=last, ax=axes[2][column])
    keep_outer_axes(axes)
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


def _budget(use: xr.DataArray) -> xr.Dataset:
    """The budget as shares of each block's channels, mean over blocks."""
    budget = routing_budget.routing_budget(use)
    return (budget / budget["width"]).mean("block")
