"""The figure about clusters: the intervals that several costs suggest, and how many of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from analysis.affinity import gradient_affinity
from analysis.cluster_count import NO_STRUCTURE, ClusterCount, interleaved, predicted_count, silhouette_count
from analysis.clustering import affinity_units, cluster_intervals, log_snr_units, partition_cost, timestep_units
from analysis.gramians import STEP
from analysis.grouping import group_by_method
from analysis.jackknife import MIN_UNITS
from analysis.methods import method_name, reference_method
from analysis.plots.clusters import plot_cluster_bars, plot_cluster_count, plot_clusters, plot_silhouette
from analysis.plots.style import method_colour
from analysis.report.panels import ReportFigure, Runs, colour_limit, panels
from lightning_modules.tracking.records import RunManifest

_MOST_REPLICATES = 4
_UNDECIDED = 4
"""Clusters to show where silhouettes decide for none."""


def clusters_figure(runs: Runs) -> ReportFigure | None:
    """Clusters of intervals by gradient affinity, beside those by t and log-SNR; None without halves or cosines."""
    by_method = group_by_method([run for run in runs if "gramian" in run and run.sizes["half"] > 1])
    matrices = {method: gradient_affinity(own) for method, own in by_method.items()}
    matrices = {method: matrix for method, matrix in matrices.items() if _clusterable(matrix)}
    if not matrices:
        return None
    counts = {method: silhouette_count(affinity_units(matrix)) for method, matrix in matrices.items()}
    predicted = _predicted({method: by_method[method] for method in matrices})
    reference = reference_method(matrices)
    shown = counts[reference].best or min(_UNDECIDED, len(counts[reference].clusterings))
    figure, axes = panels(2, 2, width=5.4, height=4.4)
    plot_clusters(
        matrices[reference],
        counts[reference].clusterings[shown].labels,
        limit=colour_limit([matrices[reference]]),
        signed=True,
        title=f"gradient cosine, {method_name(reference)}: {shown} clusters",
        ax=axes[0][0],
    )
    manifest = RunManifest.from_json(by_method[reference][0].attrs["manifest"])
    bounds = {"measured intervals": manifest.interval_bounds, **_by_schedule(manifest.log_snr, shown)}
    bounds |= {f"gradients, {method_name(name)}": count.clusterings[shown].bounds for name, count in counts.items()}
    plot_cluster_bars(bounds, manifest.log_snr, title=f"{shown} clusters by each cost", ax=axes[0][1])
    even = counts[reference].scores["even"]
    plot_silhouette(**_by_name(counts), bound=NO_STRUCTURE, even=even, ax=axes[1][0])
    if predicted:
        plot_cluster_count(**_by_name(predicted), ylabel="squared error of prediction", ax=axes[1][1])
    else:
        figure.delaxes(axes[1][1])
        axes[1][0].set_subplotspec(axes[1][0].get_gridspec()[1, :])
    return ReportFigure(
        "clusters",
        "Which intervals does affinity suggest?",
        f"{_caption(counts, predicted, shown)} {_dearer(matrices[reference], manifest.log_snr, shown)}".strip(),
        figure,
    )


def _caption(counts: dict[str, ClusterCount], predicted: dict[str, ClusterCount], shown: int) -> str:
    reference = reference_method(counts)
    said = [found[reference].said for found in (counts, predicted) if reference in found]
    return (
        "Consecutive intervals, merged so that each is as like the centre of its cluster as possible (dynamic "
        f"programming with ANT's costs). Top left: the {shown} clusters of the reference, framed in its affinity. Top "
        "right: where each cost puts the bounds; those by the distance in t and in log-SNR need no measurement. Below: "
        "mean silhouette width for each number of clusters, a ring around the largest. Up to "
        f"{NO_STRUCTURE} there is no structure, and only what lies above the dashed line is more than that neighbours "
        "are alike. "
        + "Beside it: the squared error with which means over clusters predict cosines from probes left out, relative "
        "to one mean for all. Bars are standard errors of the difference to the best; the ring is the smallest number "
        "within one of it. " * bool(predicted) + f"{method_name(reference)}: {' '.join(said)}"
    )


def _by_name(counts: dict[str, ClusterCount]) -> dict[str, Any]:
    """What the plots of a criterion take, by the methods' names."""
    return {
        "scores": {method_name(method): count.scores for method, count in counts.items()},
        "best": {method_name(method): count.best for method, count in counts.items()},
        "colours": {method_name(method): method_colour(method) for method in counts},
    }


def _clusterable(matrix: xr.DataArray) -> bool:
    """Whether silhouettes can be taken: three intervals of which something is known."""
    known = np.isfinite(matrix.values) & ~np.eye(len(matrix), dtype=bool)
    return int(known.any(0).sum()) >= 3


def _by_schedule(log_snr: Sequence[float], clusters: int) -> dict[str, tuple[int, ...]]:
    """Bounds by t and log-SNR of single timesteps. On a line the middle of a cluster is its medoid."""
    edges = np.arange(len(log_snr) + 1)
    found = {"distance in t": cluster_intervals(timestep_units(edges), clusters, centre="middle").bounds}
    if np.isfinite(log_snr).all():
        by_snr = cluster_intervals(log_snr_units(edges, log_snr), clusters, centre="middle")
        found["distance in log-SNR"] = by_snr.bounds
    return found


def _dearer(affinity: xr.DataArray, log_snr: Sequence[float], clusters: int) -> str:
    """What bounds that need no measurement cost more than the best ones, by the gradients' own cost."""
    units = affinity_units(affinity)
    best = cluster_intervals(units, clusters).cost
    schedules = {"t": timestep_units(units.edges)}
    if np.isfinite(log_snr).all():
        schedules["log-SNR"] = log_snr_units(units.edges, log_snr)
    if not best > 0:
        return ""
    more = [
        f"{partition_cost(units, cluster_intervals(each, clusters, centre='middle').bounds) / best - 1:.0%} by {name}"
        for name, each in schedules.items()
    ]
    return f"By that cost, {clusters} clusters that go by distance alone are dearer than the best: {', '.join(more)}."


def _predicted(by_method: dict[str, list[xr.Dataset]]) -> dict[str, ClusterCount]:
    """Numbers of clusters from probes left out, of those that have probes enough."""
    found = {}
    for method, runs in by_method.items():
        probes = [run.sizes[STEP] for run in runs]
        count = min(_MOST_REPLICATES, sum(probes) // MIN_UNITS, min(probes))
        if count < 2:
            continue
        parts = [interleaved(run, count) for run in runs]
        replicates = [gradient_affinity([part[at] for part in parts]) for at in range(count)]
        defined = np.isfinite(np.stack([matrix.values for matrix in replicates])).all(0)
        if (defined & ~np.eye(len(defined), dtype=bool)).any():
            found[method] = predicted_count(replicates)
    return found
