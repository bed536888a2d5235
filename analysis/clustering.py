"""Which intervals a cost suggests: optimal partitions of consecutive timesteps by dynamic programming.

Source: ANT (Go et al., arXiv 2306.00354), interval clustering: minimise the sum over clusters of Σ_t d(centre, t). A
cost is a matrix of distances between units (timesteps, or intervals that were measured as a whole):

- `timestep_units`: |t - t'|, which gives intervals of nearly equal width;
- `log_snr_units`: |log-SNR(t) - log-SNR(t')|;
- `affinity_units`: 1 - affinity(t, t'), of gradient cosines or any other affinity whose best value is 1.

ANT's centre is the middle of a cluster; the medoid, the member with the smallest sum of distances, is what makes the
sum smallest and is the default. `cluster_count` says how many clusters.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

FloatArray = npt.NDArray[np.float64]
Centre = Literal["medoid", "middle"]
_ROUNDING = 1e-12
"""Costs that differ by less than this share of one cluster's are equal; of equal splits the middle one is taken."""


@dataclasses.dataclass(frozen=True)
class Units:
    """Consecutive pieces of 0 ... T - 1 that are not divided further, and how unlike they are.

    Attributes:
        edges: N + 1 increasing integers from 0 to T; unit u holds ``edges[u] <= t < edges[u + 1]``.
        distances: (N, N), from a centre (row) to a member (column). The diagonal is 0.
        weights: (N,) how much a unit counts, its timesteps; 0 for one of which nothing is known.
        name: Of the cost.
    """

    edges: npt.NDArray[np.int64]
    distances: FloatArray
    weights: FloatArray
    name: str

    def __post_init__(self) -> None:
        size = len(self.edges) - 1
        if size < 1 or self.edges[0] != 0 or (np.diff(self.edges) < 1).any():
            raise ValueError(f"edges must start at 0 and increase, got {self.edges.tolist()}")
        if self.distances.shape != (size, size) or self.weights.shape != (size,):
            raise ValueError(
                f"{size} units need distances {(size, size)} and weights {(size,)}, got {self.distances.shape} and "
                f"{self.weights.shape}"
            )
        if not np.isfinite(self.distances).all() or not np.isfinite(self.weights).all() or (self.weights < 0).any():
            raise ValueError(f"the cost {self.name!r} must have finite distances and finite weights of at least 0")

    @property
    def size(self) -> int:
        """N."""
        return len(self.weights)


@dataclasses.dataclass(frozen=True)
class Clustering:
    """A partition of the timesteps into consecutive clusters.

    Attributes:
        bounds: k + 1 increasing integers from 0 to T, as ``intervals.bounds`` of a training configuration takes them.
        cost: Σ over clusters and their units of weight · d(centre, unit).
        labels: (N,) cluster of each unit.
        centres: (k,) unit at the centre of each cluster.
        name: Of the cost.
    """

    bounds: tuple[int, ...]
    cost: float
    labels: npt.NDArray[np.int64]
    centres: npt.NDArray[np.int64]
    name: str


def timestep_units(edges: Sequence[int] | npt.NDArray[np.integer]) -> Units:
    """Distances in t, between the middles of units; ``range(T + 1)`` are single timesteps."""
    return _units_on_line(edges, _middles(np.asarray(edges)), "timestep")


def log_snr_units(edges: Sequence[int] | npt.NDArray[np.integer], log_snr: Sequence[float] | FloatArray) -> Units:
    """Distances in log-SNR.

    Args:
        edges: N + 1 integers from 0 to T.
        log_snr: (T,) of each timestep; a unit stands at its median.

    Raises:
        ValueError: If a log-SNR is not finite (the last of a schedule with zero terminal SNR, unless it shares a unit
            with others).
    """
    snr, at = np.asarray(log_snr, dtype=float), np.asarray(edges)
    if len(snr) != at[-1]:
        raise ValueError(f"edges up to T = {at[-1]}, but {len(snr)} values of log-SNR")
    middle = np.array([np.median(snr[low:high]) for low, high in itertools.pairwise(at)])
    return _units_on_line(at, middle, "log-SNR")


def affinity_units(affinity: xr.DataArray, *, num_timesteps: int | None = None, name: str = "") -> Units:
    """Distances max(0, 1 - affinity), from the one trained on (row) to the one affected.

    Cosines corrected for noise may exceed 1, a distance cannot be below 0. A pair that is undefined counts as an
    affinity of 0, one that does not help. A unit without any defined pair has no weight and is no centre of others: it
    costs nothing, wherever it ends up, and where a bound may stand anywhere among such units, it stands in their
    middle.

    Args:
        affinity: (task, other_task) in the form of `affinity`; or (timestep, other_timestep), as of
            `timestep_affinity`, where each timestep measured stands for those nearest to it.
        num_timesteps: T, for timesteps of which the last one was not measured; the last one's number plus 1 without it.
        name: Of the cost; the affinity's own without it.
    """
    values = np.array(affinity.values, dtype=float)
    np.fill_diagonal(values, np.nan)
    undefined = np.isnan(values)
    distances = np.where(undefined, 1.0, np.maximum(1.0 - values, 0.0))
    known = ~(undefined.all(0) & undefined.all(1)) | (len(values) == 1)
    distances[~known] = distances.max()
    np.fill_diagonal(distances, 0.0)
    if affinity.dims[0] == "task":
        edges = np.append(affinity["t_low"].values, affinity["t_high"].values[-1] + 1)
    else:
        times = affinity["timestep"].values
        last = int(times[-1]) + 1 if num_timesteps is None else num_timesteps
        edges = np.concatenate([[0], (times[1:] + times[:-1] + 1) // 2, [last]])
    weights = np.where(known, np.diff(edges), 0)
    return Units(edges.astype(np.int64), distances, weights.astype(float), name or str(affinity.name or "affinity"))


def cluster_intervals(units: Units, num_clusters: int, *, centre: Centre = "medoid") -> Clustering:
    """The partition into so many clusters with the smallest cost.

    Args:
        units: What to divide, and the cost.
        num_clusters: k.
        centre: ``"medoid"``, or ANT's ``"middle"``: unit (first + last + 1) // 2.

    Raises:
        ValueError: If there are fewer units than clusters.
    """
    if not 1 <= num_clusters <= units.size:
        raise ValueError(f"num_clusters must lie in 1..{units.size}, the number of units; got {num_clusters}")
    return all_clusterings(units, num_clusters, centre=centre)[-1]


def all_clusterings(units: Units, max_clusters: int, *, centre: Centre = "medoid") -> list[Clustering]:
    """The best partitions into 1, 2, ... ``max_clusters`` clusters, for the price of one.

    One unit more on the left, one cluster less: best_k(r) = min over l of best_{k-1}(l) + cost(l, r), with the
    half-open cluster [l, r). Costs of all N² / 2 clusters take O(N³) operations on arrays and O(N²) memory.
    """
    cost = _cluster_costs(units, centre)
    size = units.size
    best = np.full((max_clusters + 1, size + 1), np.inf)
    best[0, 0] = 0.0
    for k in range(1, max_clusters + 1):
        best[k] = (best[k - 1][:, None] + cost).min(axis=0)
    return [_trace_back(units, best, cost, k, centre) for k in range(1, max_clusters + 1)]


def partition_cost(units: Units, bounds: Sequence[int], *, centre: Centre = "medoid") -> float:
    """Cost of a given partition, such as the intervals that a run was trained with.

    Raises:
        ValueError: If a bound divides a unit.
    """
    at = np.searchsorted(units.edges, bounds)
    if at[0] != 0 or at[-1] != units.size or units.edges[at].tolist() != list(bounds):
        raise ValueError(f"bounds {list(bounds)} must begin at 0, end at {units.edges[-1]} and divide no unit")
    return sum(_centre_of(units, low, high, centre)[1] for low, high in itertools.pairwise(at))


def _trace_back(units: Units, best: FloatArray, cost: FloatArray, k: int, centre: Centre) -> Clustering:
    splits = [units.size]
    for left in range(k, 0, -1):
        candidates = best[left - 1] + cost[:, splits[-1]]
        tied = np.flatnonzero(candidates <= candidates.min() + _ROUNDING * cost[0, -1])
        splits.append(int(tied[len(tied) // 2]))
    at = np.array(splits[::-1])
    centres = [_centre_of(units, low, high, centre)[0] for low, high in itertools.pairwise(at)]
    return Clustering(
        tuple(int(edge) for edge in units.edges[at]),
        float(best[k, -1]),
        np.repeat(np.arange(k), np.diff(at)),
        np.array(centres),
        units.name,
    )


def _centre_of(units: Units, low: int, high: int, centre: Centre) -> tuple[int, float]:
    """Centre of the cluster [low, high) and its cost."""
    sums = units.distances[low:high, low:high] @ units.weights[low:high]
    at = int((high - low) // 2 if centre == "middle" else sums.argmin())
    return int(low) + at, float(sums[at])


def _cluster_costs(units: Units, centre: Centre) -> FloatArray:
    """(N + 1, N + 1) cost of the cluster [l, r), infinite unless l < r."""
    size = units.size
    sums = np.zeros((size, size + 1))  # of weighted distances from c to the first r units, at [c, r]
    np.cumsum(units.distances * units.weights, axis=1, out=sums[:, 1:])
    cost = np.full((size + 1, size + 1), np.inf)
    if centre == "middle":
        low, high = np.triu_indices(size + 1, 1)
        middle = (low + high) // 2
        cost[low, high] = sums[middle, high] - sums[middle, low]
        return cost
    # A centre must lie in its cluster: c < r. What a centre costs up to r is finite only then.
    upper = np.where(np.arange(size)[:, None] < np.arange(1, size + 1), sums[:, 1:], np.inf)
    for first in range(size):
        cost[first, first + 1 :] = (upper[first:, first:] - sums[first:, first, None]).min(axis=0)
    return cost


def _units_on_line(edges: Sequence[int] | npt.NDArray[np.integer], at: FloatArray, name: str) -> Units:
    whole = np.asarray(edges, dtype=np.int64)
    if not np.isfinite(at).all():
        raise ValueError(f"{name} is not finite for unit {int(np.flatnonzero(~np.isfinite(at))[0])}: leave it out")
    return Units(whole, np.abs(at[:, None] - at), np.diff(whole).astype(float), name)


def _middles(edges: npt.NDArray[np.integer]) -> FloatArray:
    """Mean timestep of each unit."""
    return (edges[:-1] + edges[1:] - 1) / 2
