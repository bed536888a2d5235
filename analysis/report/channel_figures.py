"""The figures about channels: which task uses which, how many, and which belong to whom."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from analysis import activations, convergence, frames
from analysis.method_channels import MethodChannels
from analysis.methods import method_name
from analysis.plots.channel_shares import plot_block_task_shares, plot_specialisation, plot_usage_by_block
from analysis.plots.channels import plot_channel_usage, plot_mask_use, plot_task_shares
from analysis.plots.curves import plot_curves
from analysis.report.panels import ReportFigure, keep_outer_axes, keep_outer_labels, panels

Channels = Mapping[str, MethodChannels]
_BLOCK_INCHES = 0.3
_TASK_INCHES = 0.16
_SITES: tuple[tuple[activations.Site, str], ...] = (("input", "read"), ("update", "written"))


def channels_figure(channels: Channels, shown_blocks: int = 4) -> ReportFigure:
    """Energy of every channel by task, below the mask, for the first run of each method.

    Args:
        channels: Of what is compared.
        shown_blocks: How many blocks to draw at most, from the first to the last.
    """
    rows = 1 + min(shown_blocks, _most_blocks(channels))
    tasks = next(iter(channels.values())).allowed.sizes["task"]
    figure, axes = panels(rows, len(channels), height=max(2.0, 0.6 + _TASK_INCHES * tasks))
    for column, (method, own) in enumerate(channels.items()):
        last = column == len(channels) - 1
        use, energy = own.allowed.isel(run=0), own.energy().isel(run=0)
        blocks = _spread(energy["block"].values, shown_blocks)
        title = f"{method_name(method)}: {'mask' if 'mask' in own.runs[0] else 'no mask'}"
        plot_mask_use(use.sel(block=blocks[0]), title=title, colorbar=last, ax=axes[0][column])
        for ax, block in zip(axes[1:, column], blocks, strict=False):
            shown, allowed = energy.sel(block=block), use.sel(block=block) > 0
            plot_channel_usage(shown / shown.mean("channel"), allowed=allowed, title=block, colorbar=last, ax=ax)
        for ax in axes[1 + len(blocks) :, column]:
            ax.set_axis_off()
    keep_outer_axes(axes, same_x=False)
    return ReportFigure(
        "channels",
        "Who uses which channels",
        "Top: the share of an interval's timesteps at which the mask lets it use each channel of the first block drawn "
        "(black: all of them; a plain model has no mask). Below, block by block: the energy of each channel at the "
        "input of the block's branches while an interval is processed, relative to the mean (first seed, last quarter "
        "of training); white is unused, the orange line encloses what the mask allows. Look for a band that moves with "
        "t (DTR); random routing thins every channel alike, since its masks change with every timestep. Vertical "
        "stripes are channels that are strong or weak for everyone, also without a mask.",
        figure,
    )


def channel_count_figure(channels: Channels) -> ReportFigure:
    """Used, silent, masked and dead channels of each block, of what its branches read and write."""
    figure, axes = panels(len(_SITES), len(channels), height=1.1 + _BLOCK_INCHES * _most_blocks(channels))
    for row, (site, words) in enumerate(_SITES):
        for column, (method, own) in enumerate(channels.items()):
            usage = own.usage(site).mean("task").mean("run")
            title = f"{method_name(method)}: {words}"
            plot_usage_by_block(usage, title=title, legend=False, ax=axes[row][column])
    keep_outer_labels(axes)
    _name_rows_once(axes)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return ReportFigure(
        "channel_counts",
        "Used, silent and dead channels",
        "The share of a block's channels that an interval uses (energy above a ten-thousandth of the block's mean), "
        "leaves silent although it may use them, or is kept from by the mask at all of its timesteps; mean over "
        "intervals and seeds, last quarter of training. Top: what the block's branches read. Bottom: what they add, "
        "which no mask touches. The number at the right counts the channels that no interval uses. Look for blocks "
        "with silent or dead channels: width that does nothing. (The probes may have missed a channel that the mask "
        "allows at a few timesteps only.)",
        figure,
    )


def effective_channels_figure(channels: Channels, curves: pd.DataFrame) -> ReportFigure:
    """Effective channels by task at the end of training, and over training.

    Args:
        channels: Of what is compared.
        curves: `frames.curves_frame` of it.
    """
    figure, axes = panels(1, 2, width=5.2, height=3.8)
    by_task = _all_runs({method: own.usage()["effective_share"].mean("block") for method, own in channels.items()})
    mean = by_task.groupby("method").mean()
    plot_task_shares(by_task, mean=mean, top=1, ylabel="effective share of channels", ax=axes[0][0])
    aligned = convergence.aligned_curves(curves, frames.EFFECTIVE_CHANNELS)
    plot_curves(
        aligned,
        mean=convergence.mean_curves(aligned),
        ylabel="effective channels of a block",
        is_loss=False,
        ax=axes[0][1],
    )
    return ReportFigure(
        "effective_channels",
        "How many channels carry a task",
        "Left: effective share of the channels that the blocks' branches read (participation ratio of their energies: "
        "1 if all channels carry the same energy, 1/C if one carries all), mean over blocks, last quarter of training. "
        "Right: the effective number over training, mean over blocks and intervals. Thin lines are seeds. Look for "
        "intervals that live in few channels, and whether that is so without a mask, too.",
        figure,
    )


def effective_by_block_figure(channels: Channels) -> ReportFigure:
    """Effective share of channels by block and task."""
    height = max(3.2, 1.4 + 0.7 * _BLOCK_INCHES * _most_blocks(channels))
    figure, axes = panels(1, len(channels), height=height)
    by_block = {method: own.usage()["effective_share"].mean("run") for method, own in channels.items()}
    top = max(float(share.max()) for share in by_block.values())
    for column, (method, share) in enumerate(by_block.items()):
        plot_block_task_shares(
            share,
            top=top,
            label="effective share",
            title=method_name(method),
            colorbar=column == len(by_block) - 1,
            ax=axes[0][column],
        )
    _name_rows_once(axes)
    return ReportFigure(
        "effective_channels_by_block",
        "Where in the network few channels carry a task",
        "The effective share of the channels that a block's branches read, while an interval is processed; mean over "
        "seeds, last quarter of training, one scale. Look for dark blocks, in which a few channels carry almost all "
        "energy, and for rows that change with the noise.",
        figure,
    )


def specialisation_figure(channels: Channels, shown_blocks: int = 8) -> ReportFigure:
    """How specialised channels are by block and method, and which tasks they belong to.

    Args:
        channels: Of what is compared.
        shown_blocks: How many blocks to draw at most, from the first to the last.
    """
    profiles = {method: activations.channel_profile(own.energy()) for method, own in channels.items()}
    table, reference = _specialisation_tables(channels, profiles, shown_blocks)
    rows = table["block"].nunique() * len(channels)
    figure, axes = panels(1, 2, width=5.6, height=max(4.0, 1.4 + 0.8 * _BLOCK_INCHES * rows))
    plot_specialisation(table, reference=reference, ax=axes[0][0])
    preferring = _all_runs({method: _preferring(profile) for method, profile in profiles.items()})
    plot_task_shares(
        preferring,
        mean=preferring.groupby("method").mean(),
        reference=1 / preferring.sizes["task"],
        ylabel="share of channels that prefer the interval",
        ax=axes[0][1],
    )
    return ReportFigure(
        "specialisation",
        "Do channels belong to intervals?",
        "Left: how far the energy of a channel belongs to few intervals (1 less the relative entropy of its shares, "
        "after dividing by each interval's total), boxes over the channels of all seeds at the branches' input "
        "(quartiles, whiskers from 5 to 95 %), on a square-root scale. The black line is what a channel that all "
        "intervals use alike would show for the noise of these few probes alone: boxes close to it say nothing. Right: "
        "to which interval channels give their largest share; the dashed line is an equal division. Routing must show "
        "here; look whether the plain model specialises on its own, and in which blocks.",
        figure,
    )


def _spread(names: np.ndarray, most: int) -> list[str]:
    """So many of the blocks at most, evenly from the first to the last."""
    at = np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int)
    return [str(name) for name in names[at]]


def _most_blocks(channels: Channels) -> int:
    return max(own.allowed.sizes["block"] for own in channels.values())


def _specialisation_tables(
    channels: Channels, profiles: dict[str, xr.Dataset], most: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Specialisation of every channel (method, block, specialisation), and the reference by method and block."""
    tables, references = [], []
    for method, own in channels.items():
        blocks = _spread(own.allowed["block"].values, most)
        special = profiles[method]["specialisation"].sel(block=blocks).transpose("block", "run", "channel").values
        noise = activations.unspecialised_reference(own.late().sel(block=blocks)).median("channel").mean("run")
        names = np.repeat(blocks, special[0].size)
        tables.append(pd.DataFrame({"method": method, "block": names, "specialisation": special.ravel()}).dropna())
        references.append(pd.DataFrame({"method": method, "block": blocks, "value": noise.sel(block=blocks).values}))
    return pd.concat(tables, ignore_index=True), pd.concat(references, ignore_index=True)


def _preferring(profile: xr.Dataset) -> xr.DataArray:
    """Share of the channels that prefer each task, mean over blocks: (run, task)."""
    return activations.specialisation_by_block(profile)["preferring"].mean("block")


def _all_runs(shares: dict[str, xr.DataArray]) -> xr.DataArray:
    """A share (run, task) of every run with the run's method."""
    return xr.concat(
        [share.assign_coords(method=("run", [method] * share.sizes["run"])) for method, share in shares.items()],
        "run",
        coords="minimal",
        compat="override",
    )


def _name_rows_once(axes: np.ndarray) -> None:
    """Leaves the names of rows at the left panel only where the others have the same."""
    for row in axes:
        names = [[label.get_text() for label in ax.get_yticklabels()] for ax in row]
        for ax, own in zip(row[1:], names[1:], strict=True):
            if own == names[0]:
                ax.tick_params(labelleft=False)
