"""How many clusters: two criteria, what each is for, and what it cannot see.

- `silhouette_count` looks at one matrix of distances, and asks whether units are closer to their own cluster than to
  the next one. It takes any cost, but knows nothing of the noise in an affinity. Take it for the timestep and log-SNR
  costs, and for a single affinity.
- `predicted_count` needs independent measurements of one affinity (seeds, or `interleaved` probes of one run), and asks
  how finely the intervals can be divided until the means of blocks predict a further measurement no better. One cluster
  is among its answers. Prefer it wherever there are replicates.

Where an affinity falls off smoothly with the distance there is no true number of clusters; the better it is measured,
the more of them can be told apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from sklearn.metrics import silhouette_score

from analysis.clustering import Centre, Clustering, Units, affinity_units, all_clusterings, timestep_units
from analysis.gramians import STEP

FloatArray = npt.NDArray[np.float64]
NO_STRUCTURE = 0.25
"""A mean silhouette width up to this is "no substantial structure" (Kaufman and Rousseeuw, Finding Groups in Data,
1990, chapter 2, table 4); up to 0.5 it is weak and could be artificial, above 0.7 strong."""
MOST = 20
"""Clusters to try where nothing is said."""


@dataclasses.dataclass(frozen=True)
class ClusterCount:
    """Values of a criterion, and the number of clusters it chooses.

    Attributes:
        scores: Index ``num_clusters``, columns ``value`` and ``standard_error`` (NaN where there is none); silhouettes
            have a column ``even``, too.
        best: The number chosen; None if no division shows structure.
        said: The choice in words.
        clusterings: The best partition for every number in ``scores``.
    """

    scores: pd.DataFrame
    best: int | None
    said: str
    clusterings: dict[int, Clustering]


def silhouette_count(units: Units, max_clusters: int | None = None, *, centre: Centre = "medoid") -> ClusterCount:
    """The number of clusters with the largest mean silhouette width.

    Source: Rousseeuw (Journal of Computational and Applied Mathematics 20, 1987): of each unit (b - a) / max(a, b), a
    being its mean distance to its own cluster and b that to the nearest other one; 0 for a cluster of one. Each unit
    counts once, those without weight are left out. Distances from and to a unit are averaged.

    Widths above `NO_STRUCTURE` need not mean groups: points spaced evenly on a line have about 0.6 for two clusters.
    The column ``even`` of the scores therefore has the widths of the same units by their distance in t alone, and only
    what exceeds them is more than "neighbours are alike".

    Args:
        units: What is divided.
        max_clusters: Largest number to try; without it all up to one fewer than units, at most `MOST`.
        centre: As for `clustering.cluster_intervals`.

    Raises:
        ValueError: If there are fewer than three units with a weight.
    """
    known = np.flatnonzero(units.weights > 0)
    if len(known) < 3:
        raise ValueError(f"silhouettes need at least 3 units of which something is known, got {len(known)}")
    most = _most(max_clusters, len(known) - 1)
    line = timestep_units(units.edges)
    found, on_line = all_clusterings(units, most, centre=centre), all_clusterings(line, most, centre="middle")
    values, even = (_silhouettes(each, known, own) for each, own in ((units, found), (line, on_line)))
    scores = _scores(values, dict.fromkeys(values, np.nan)).assign(even=pd.Series(even))
    best = max(values, key=lambda k: np.nan_to_num(values[k], nan=-1.0))
    if not values[best] > NO_STRUCTURE:
        said = (
            f"No division of the {units.name} cost shows structure: the largest mean silhouette width is "
            f"{values[best]:.2f}, and up to {NO_STRUCTURE} it means nothing."
        )
        return ClusterCount(scores, None, said, dict(enumerate(found, 1)))
    said = (
        f"{best} clusters of the {units.name} cost have the largest mean silhouette width, {values[best]:.2f}; by "
        f"their distance in t alone the best {best} have {even[best]:.2f}."
    )
    return ClusterCount(scores, best, said, dict(enumerate(found, 1)))


def predicted_count(
    replicates: Sequence[xr.DataArray], max_clusters: int | None = None, *, centre: Centre = "medoid"
) -> ClusterCount:
    """The smallest number of clusters that predicts a left-out replicate about as well as the best one does.

    The mean of all replicates but one is divided; the means of its cells within every pair of clusters predict the
    cells of the one left out. The value is the mean squared error over the pairs of tasks defined everywhere, averaged
    over the replicates left out, relative to that of one cluster. Too few clusters miss structure, too many take noise
    for it. The choice is the one-standard-error rule (Hastie, Tibshirani and Friedman, The Elements of Statistical
    Learning, 2009, section 7.10): the smallest number whose error is within one standard error of the smallest error,
    here the standard error of the difference of the two over replicates.

    Args:
        replicates: Independent measurements of one affinity, at least two, such as one per seed. Cells are weighted by
            the inverse of their squared standard errors if all replicates state them.
        max_clusters: Largest number to try; all without it, at most `MOST`.
        centre: As for `clustering.cluster_intervals`.

    Raises:
        ValueError: If there are fewer than two replicates, or no pair of tasks is defined in all of them.
    """
    if len(replicates) < 2:
        raise ValueError(f"predicting one replicate from the others needs at least two, got {len(replicates)}")
    values = np.stack([matrix.values.astype(float) for matrix in replicates])
    cells = np.isfinite(values).all(0) & ~np.eye(values.shape[1], dtype=bool)
    if not cells.any():
        raise ValueError("no pair of tasks is defined in all replicates: pool more probes in each")
    weight, most = _precision(replicates, cells), _most(max_clusters, values.shape[1])
    errors = np.empty((len(values), most))
    for at in range(len(values)):
        known = _mean_of(replicates[0], np.delete(values, at, axis=0), cells)
        for k, clustering in enumerate(all_clusterings(affinity_units(known), most, centre=centre)):
            wrong = values[at] - _block_means(known.values, weight, clustering.labels)
            errors[at, k] = np.average(wrong[cells] ** 2, weights=weight[cells])
    errors /= errors[:, 0].mean()
    apart = errors - errors[:, [errors.mean(0).argmin()]]
    error = apart.std(0, ddof=1) / np.sqrt(len(errors))
    best = int(np.flatnonzero(apart.mean(0) <= error)[0]) + 1
    units = affinity_units(_mean_of(replicates[0], values, cells))
    found = dict(enumerate(all_clusterings(units, most, centre=centre), 1))
    scores = _scores(dict(enumerate(errors.mean(0), 1)), dict(enumerate(error, 1)))
    if best == 1:
        said = f"No division of the {units.name} predicts a left-out measurement better than a single mean."
        return ClusterCount(scores, None, said, found)
    if best == units.size:
        said = f"All {best} intervals differ in their {units.name} beyond its noise, which sets no limit to the number."
        return ClusterCount(scores, best, said, found)
    said = (
        f"{best} clusters of the {units.name} predict a left-out measurement about as well as any number does, with "
        f"{scores['value'][best]:.2f} times the squared error of a single mean."
    )
    return ClusterCount(scores, best, said, found)


def interleaved(run: xr.Dataset, parts: int) -> list[xr.Dataset]:
    """A run's gradient probes dealt out to so many replicates: every ``parts``-th probe each.

    They share the network and the course of training, so what they agree on may still be peculiar to this seed.

    Raises:
        ValueError: If there are fewer probes than parts.
    """
    if not 1 <= parts <= run.sizes[STEP]:
        raise ValueError(f"parts must lie in 1..{run.sizes[STEP]}, the number of probes; got {parts}")
    return [run.isel({STEP: slice(start, None, parts)}) for start in range(parts)]


def _most(asked: int | None, possible: int) -> int:
    most = min(possible, MOST) if asked is None else asked
    if not 1 <= most <= possible:
        raise ValueError(f"max_clusters must lie in 1..{possible}, got {most}")
    return most


def _silhouettes(units: Units, known: npt.NDArray[np.intp], found: Sequence[Clustering]) -> dict[int, float]:
    """Mean widths of partitions into 2, 3, ... clusters; NaN where the units known are in one cluster or all apart."""
    between = (units.distances + units.distances.T)[np.ix_(known, known)] / 2
    widths = {}
    for k, clustering in enumerate(found[1:], 2):
        labels = clustering.labels[known]
        divided = 1 < len(np.unique(labels)) < len(labels)
        widths[k] = float(silhouette_score(between, labels, metric="precomputed")) if divided else np.nan
    return widths


def _scores(values: Mapping[int, float], errors: Mapping[int, float]) -> pd.DataFrame:
    index = pd.Index(list(values), name="num_clusters")
    return pd.DataFrame({"value": list(values.values()), "standard_error": list(errors.values())}, index, dtype=float)


def _mean_of(like: xr.DataArray, values: FloatArray, cells: npt.NDArray[np.bool_]) -> xr.DataArray:
    return like.copy(data=np.where(cells, values.mean(0), np.nan))


def _precision(replicates: Sequence[xr.DataArray], cells: npt.NDArray[np.bool_]) -> FloatArray:
    """(K, K) weights of cells: inverse mean squared standard errors if all are known, else equal ones; 0 elsewhere."""
    if all("standard_error" in matrix.coords for matrix in replicates):
        square = np.mean([matrix["standard_error"].values ** 2 for matrix in replicates], axis=0)
        if (square[cells] > 0).all():
            return np.divide(1.0, square, out=np.zeros_like(square), where=cells)
    return cells.astype(float)


def _block_means(values: FloatArray, weight: FloatArray, labels: npt.NDArray[np.int64]) -> FloatArray:
    """Each cell's weighted mean over the pair of clusters it lies in."""
    member = (labels == np.arange(labels.max() + 1)[:, None]).astype(float)
    sums = member @ (np.nan_to_num(values) * weight) @ member.T
    total = member @ weight @ member.T
    return np.divide(sums, total, out=np.zeros_like(sums), where=total > 0)[np.ix_(labels, labels)]
