"""The figures about gradient affinity: does routing follow it, how it changes, and which other measures agree."""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr

from analysis import affinity
from analysis.affinity_measures import NAMES
from analysis.agreement import agreement_table, distance_matrix, rank_correlation
from analysis.gramians import STEP
from analysis.grouping import group_by_method
from analysis.jackknife import MIN_UNITS
from analysis.methods import method_name, reference_method
from analysis.plots.affinity import plot_affinity_film, plot_agreement
from analysis.plots.matrices import plot_conflict_matrix, plot_overlap
from analysis.report.panels import ReportFigure, Runs, colour_limit, film_panels, keep_outer_labels, panels

_MOST_WINDOWS = 6
_PERMUTATIONS = 1999


def affinity_figure(runs: Runs) -> ReportFigure | None:
    """Mask overlap of a routed run beside the gradient affinity of the reference; None without a routed run."""
    routed = next((run for run in runs if run.attrs["method"] == "dtr" and "mask" in run), None)
    routed = routed or next((run for run in runs if "mask" in run), None)
    if routed is None:
        return None
    reference = reference_method(run.attrs["method"] for run in runs)
    own = [run for run in runs if run.attrs["method"] == reference]
    gradient = affinity.gradient_affinity(own, corrected=_halved(own))
    overlap = affinity.mask_overlap(routed)
    figure, axes = panels(1, 2, width=4.6, height=4.6, square=True)
    plot_conflict_matrix(
        gradient, limit=colour_limit([gradient]), title=f"gradient cosine, {method_name(reference)}", ax=axes[0][0]
    )
    plot_overlap(overlap, title=f"mask overlap, {method_name(routed.attrs['method'])}", ax=axes[0][1])
    return ReportFigure(
        "affinity",
        "Does the routing share channels between tasks that agree?",
        "Left: gradient cosine of the intervals in the reference model, noise-corrected where halves were measured. "
        "Right: how many channels the routing lets two intervals share (Jaccard index of their masks). If routing "
        f"follows affinity, both fall off in the same places. {_agreement(gradient, overlap)}",
        figure,
    )


def affinity_film_figure(runs: Runs) -> ReportFigure | None:
    """Gradient affinity of each method in windows of training; None with too few probes for two windows."""
    by_method = group_by_method([run for run in runs if "gramian" in run])
    windows = min([_MOST_WINDOWS, *(_most_windows(own) for own in by_method.values())])
    if not by_method or windows < 2:
        return None
    halved = all(_halved(own) for own in by_method.values())
    films = {
        method: affinity.gradient_affinity_film(own, windows=windows, corrected=halved)
        for method, own in by_method.items()
    }
    size = next(iter(films.values())).sizes["task"]
    figure, axes = film_panels(len(films), windows, size)
    limit = colour_limit([frame for film in films.values() for frame in film])
    for ax, (method, film) in zip(axes[:, 0], films.items(), strict=True):
        plot_affinity_film(
            film, significant=affinity.significant_cells(film), limit=limit, title=method_name(method), ax=ax
        )
    keep_outer_labels(axes)
    return ReportFigure(
        "affinity_film",
        "How affinity changes during training",
        f"Gradient cosine between the intervals{', noise-corrected,' * halved} in {windows} consecutive parts of "
        f"training, each a matrix of {size} x {size} intervals with columns in the order of the rows; blue pairs help "
        "each other, red ones conflict, a dot marks what differs from zero (false discovery rate 5 % over all parts). "
        "Hatched: a gradient that cannot be told from noise in that part. Look whether conflicts come and go, whether "
        "late training pulls intervals apart, and whether the methods differ from the start or only in the end.",
        figure,
    )


def agreement_figure(affinities: Mapping[str, Mapping[str, xr.DataArray]]) -> ReportFigure | None:
    """Rank correlations between all affinities of each method; None if no method has two.

    Args:
        affinities: By method and name, of `affinity_measures.affinities_by_method`.
    """
    by_method = {method: found for method, found in affinities.items() if len(found) > 1}
    if not by_method:
        return None
    near = _closeness(next(iter(next(iter(by_method.values())).values())))
    names = [name for name in NAMES if any(name in found for found in by_method.values())] + list(near)
    side = 1.0 + 0.32 * len(names)
    figure, axes = panels(1, len(by_method), width=side, height=side, square=True)
    for column, (method, found) in enumerate(by_method.items()):
        table = agreement_table(found, beside=near, given=list(near.values()), permutations=_PERMUTATIONS)
        last = column == len(by_method) - 1
        plot_agreement(table, names=names, title=method_name(method), colorbar=last, ax=axes[0][column])
        axes[0][column].tick_params(labelleft=column == 0)
    return ReportFigure(
        "affinity_agreement",
        "Do the measures of affinity agree?",
        "Rank correlation between the affinities that were measured, over all pairs of intervals. Above the diagonal: "
        "as they are. Neighbours are alike in all of them, so compare with the last columns, closeness itself. Below: "
        "the partial correlation given closeness in t and in log-SNR. Hatched: not measured, or nothing is left to "
        "correlate. A dot above the diagonal: beyond what intervals in random order give (Mantel test, false discovery "
        "rate 5 % over all pairs of measures; closeness is shown, not tested). A dot below: also beyond what shifting "
        "all intervals gives, which keeps neighbours together; with K intervals its p-values begin at 1/(2K), so with "
        "fewer than ten there can be none. Gradient cosine and first-order TAG come from the same gradients. "
        "If the partial correlation of mask overlap is negative, routing shares channels elsewhere than gradients do.",
        figure,
    )


def _most_windows(runs: Runs) -> int:
    """Windows with at least so many probes each that their errors mean something."""
    return min(sum(run.sizes[STEP] for run in runs) // MIN_UNITS, max(run.sizes[STEP] for run in runs))


def _halved(runs: Runs) -> bool:
    return all(run.sizes["half"] > 1 for run in runs)


def _closeness(tasks: xr.DataArray | xr.Dataset) -> dict[str, xr.DataArray]:
    near = {"closeness in t": distance_matrix(tasks)}
    if "log_snr" in tasks.coords:
        near["closeness in log-SNR"] = distance_matrix(tasks, "log_snr")
    return near


def _agreement(gradient: xr.DataArray, overlap: xr.DataArray) -> str:
    given = list(_closeness(gradient).values())
    try:
        plain = rank_correlation(gradient, overlap, permutations=_PERMUTATIONS)
        partial = rank_correlation(gradient, overlap, given=given, scheme="shifts")
    except ValueError:
        return "Too few pairs have a defined cosine to correlate the two."
    smallest = 1 / (2 * gradient.sizes["task"])
    return (
        f"Their rank correlation over {plain.pairs} pairs is {plain.correlation:.2f} (permutation p = "
        f"{plain.p_value:.3g}). Neighbouring intervals are alike in both, which says little; given how close intervals "
        f"are in t and log-SNR, the correlation is {partial.correlation:.2f} (p = {partial.p_value:.3g} from shifting "
        f"all intervals, which cannot fall below {smallest:.3g})."
    )
