"""The figures about routing: with whom tasks share channels, how often each is used, and how far their sets overlap."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from analysis import activations, affinity, grouping, routing_budget
from analysis.method_channels import MethodChannels
from analysis.methods import method_name
from analysis.plots.channel_shares import plot_routing_budget
from analysis.plots.channels import plot_channel_frequency
from analysis.plots.matrices import plot_overlap
from analysis.plots.style import method_colour
from analysis.report.panels import ReportFigure, keep_outer_axes, panels
from lightning_modules.tracking.records import RunManifest


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
        plot_channel_frequency(*_frequencies(own), colour=method_colour(method), ax=axes[1][column])
        if _settings(own).get("per_block"):
            axes[1][column].set_xlabel("channels of each block, by its mask")
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
        "timesteps and moves a few: look how many an interval has for itself, and at which noise. Random routing "
        "gives no interval anything of its own, yet changes the channels with every timestep. Cluster masks give a "
        "cluster of timesteps channels of its own: an interval has them alone if it is that cluster. Learned masks "
        "are those at the end of training. Bottom: at how many timesteps each channel is used (colour, a line for "
        "each block of the first seed) and allowed (grey); where every block has an order of its own, from the "
        "channel allowed most often to the one allowed least."
        f"{_adherence(channels)}",
        figure,
    )


def _frequencies(own: MethodChannels) -> tuple[xr.DataArray, xr.DataArray]:
    """How often the first run uses each channel, and may use it: (block, channel) both.

    Where blocks have orders of their own, each block's channels are put in that of how often they are allowed.
    """
    used, allowed = (
        routing_budget.channel_frequency(use.isel(run=0)).transpose("block", "channel")
        for use in (own.measured, own.allowed)
    )
    if _settings(own).get("per_block"):
        order = np.argsort(-allowed.values, axis=1, kind="stable")  # absent channels, NaN, come last
        used, allowed = (each.copy(data=np.take_along_axis(each.values, order, 1)) for each in (used, allowed))
    return used, allowed


def _settings(own: MethodChannels) -> Mapping[str, object]:
    """The routing's settings, of the first run; empty for a plain model."""
    return RunManifest.from_json(own.runs[0].attrs["manifest"]).routing or {}


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
            said += f"{outside:.2%} of their energy lies on other channels" if outside else "no others carry energy"
            moved = outside > 0 and _settings(own).get("kind") == "learned"
            said += ", which the masks have left while the energy was measured." if moved else "."
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
