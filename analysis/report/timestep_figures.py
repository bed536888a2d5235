"""The figures over single timesteps: affinity of their gradients, similarity of their representations."""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis.grouping import group_by_method, stack_runs, with_same_blocks
from analysis.methods import method_name
from analysis.plots.timesteps import plot_timestep_affinity, plot_timestep_cka
from analysis.report.panels import ReportFigure, Runs, keep_outer_axes, panels
from analysis.representation import timestep_cka

_TIMES = ["probed_timestep", "other_probed_timestep"]


def timestep_affinity_figure(affinity: xr.Dataset) -> ReportFigure:
    """The plain and the corrected matrix beside each other.

    Args:
        affinity: From `timestep_affinity.timestep_affinity`.
    """
    figure, axes = panels(1, 2, width=5.5, height=5.2, square=True)
    plain = affinity["plain_cosine"].assign_coords(log_snr=affinity["log_snr"])
    plot_timestep_affinity(plain, title="plain", colorbar=False, ax=axes[0][0])
    plot_timestep_affinity(affinity["cosine"], title="noise-corrected", ax=axes[0][1])
    keep_outer_axes(axes)
    return ReportFigure(
        "timestep_affinity",
        "Affinity between single timesteps",
        "Cosine between the gradients of the losses at single timesteps. Noise draws the plain cosine (left) towards "
        "zero; the corrected one (right) is free of that and may exceed 1. Grey: a gradient that cannot be told from "
        f"noise. Standard error of a corrected cosine: {affinity.attrs['sampling_error']:.3f} from sampling, "
        f"{affinity.attrs['sketch_error']:.3f} from the projection to {affinity.attrs['width']} numbers.",
        figure,
    )


def representation_figure(runs: Runs, shown_blocks: int = 4) -> ReportFigure | None:
    """CKA between timesteps, block by block and method by method; None if no representations were measured.

    Args:
        runs: What was compared.
        shown_blocks: How many blocks to draw at most, from the first to the last.
    """
    measured = [run for run in runs if "representation_hsic" in run]
    by_method = {method: _mean_cka(own) for method, own in group_by_method(measured).items()}
    if not by_method:
        return None
    columns = min(shown_blocks, max(cka.sizes["block"] for cka in by_method.values()))
    figure, axes = panels(len(by_method), columns, width=2.9, height=3.2, square=True)
    low = _lower_end(list(by_method.values()))
    for row, (method, cka) in enumerate(by_method.items()):
        blocks = cka["block"].values
        at = np.unique(np.linspace(0, len(blocks) - 1, columns).round().astype(int))
        for ax, block in zip(axes[row], blocks[at], strict=False):
            title = f"{method_name(method)}: {block}"
            plot_timestep_cka(cka.sel(block=block), low=low, title=title, colorbar=False, ax=ax)
        for ax in axes[row][len(at) :]:
            ax.set_axis_off()
    image = axes[0][0].images[0]
    figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, label="CKA", extend="min" if low > 0 else "neither")
    keep_outer_axes(axes)
    return ReportFigure(
        "representation_similarity",
        "How alike are the representations at different timesteps?",
        "Linear CKA (unbiased estimator) between what a block hands on at two timesteps, for the same images; mean "
        "over runs of the same blocks and timesteps, last measured checkpoint, one scale, "
        f"{'which begins above zero' if low else 'from zero'}. Square "
        "patches along the diagonal are ranges of timesteps that the block treats alike. DTR's paper (figure 6) shows "
        "such matrices to argue that routing makes distant timesteps differ more: compare the corners away from the "
        "diagonal between the rows, and look in which depth they are darkest. Grey: a block that hands on the same for "
        "all images.",
        figure,
    )


def _mean_cka(runs: Runs) -> xr.DataArray:
    """Mean over the runs that have the blocks and timesteps of the first one: (block, ...)."""
    each = [timestep_cka(run) for run in with_same_blocks(runs)]
    alike = [cka for cka in each if all(np.array_equal(cka[dim], each[0][dim]) for dim in _TIMES)]
    return stack_runs(alike).mean("run")


def _lower_end(found: list[xr.DataArray]) -> float:
    """Zero, or the tenth below all values where even the least alike timesteps are much alike."""
    lowest = min((float(cka.min()) for cka in found), default=0.0)
    return float(np.clip(np.floor(10 * lowest) / 10, 0.0, 0.9)) if lowest > 0.5 else 0.0
