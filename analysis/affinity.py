"""Task-affinity matrices, all in one form, and how well two of them agree.

Every matrix is an `xarray.DataArray` (task, other_task) with the interval coordinates of the run (labels, bounds in t,
log-SNR). Undefined cells are NaN.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import stats

from analysis.conflict import corrected_cosine, plain_cosine
from analysis.gramians import Level, run_gramian
from analysis.update import first_order_tag


def gradient_affinity(run: xr.Dataset, *, corrected: bool = True, level: Level = "total") -> xr.DataArray:
    """Cosine between the gradients of two tasks, over all probes of the run.

    Args:
        run: A run with gradient probes. Restrict the part of training with ``run.sel(gradient_step=slice(a, b))``.
        corrected: Whether to take the noise out (`conflict.corrected_cosine`) or to show the plain cosine of the
            averaged Gramian, which noise draws towards zero.
        level: Over all parameters, or with a leading dimension ``block`` or ``layer``.

    Returns:
        (task, other_task), or (block | layer, task, other_task).

    Raises:
        UserInputError: If the run has no gradient probes.
    """
    gramian = run_gramian(run, level)
    measure = corrected_cosine if corrected else plain_cosine
    matrix = measure(gramian, run["group_count"])["cosine"]
    return matrix.rename("gradient affinity").assign_attrs(long_name="gradient cosine", corrected=corrected)


def tag_affinity(run: xr.Dataset, learning_rate: float | xr.DataArray, *, level: Level = "total") -> xr.DataArray:
    """Task affinity grouping to first order: the share of a task's loss that a step on another removes.

    Unlike `gradient_affinity` it is directed and knows how large gradients and losses are: an interval with large
    gradients moves all others, and intervals with small losses are moved most.

    Args:
        run: A run with gradient probes.
        learning_rate: Of plain gradient descent; one number or one for every probe (gradient_step).
        level: Over all parameters, or the part that each block or layer contributes.

    Returns:
        (task, other_task), from task to other_task, or with a leading ``block`` or ``layer``.

    Raises:
        UserInputError: If the run has no gradient probes.
    """
    gramian = run_gramian(run, level)
    found = first_order_tag(gramian, run["group_count"], run["group_loss"], learning_rate)
    return found["affinity"].rename("TAG affinity").assign_attrs(long_name="relative decrease of the loss")


def mask_overlap(run: xr.Dataset) -> xr.DataArray:
    """Overlap of the channels that two intervals may use: the affinity that a routing method builds in.

    The Jaccard index |A and B| / |A or B| of the channel masks of two timesteps, averaged over all pairs of timesteps
    of the two intervals, and over blocks.

    Args:
        run: A routed run, with ``mask`` (block, timestep, channel).

    Returns:
        (task, other_task) in [0, 1]. The diagonal is below 1 where masks differ within an interval.

    Raises:
        ValueError: If the run is plain and has no masks.
    """
    if "mask" not in run:
        raise ValueError(f"run {run.attrs.get('name', '')} is not routed: it has no channel masks")
    starts = run["t_low"].values
    widths = run["t_high"].values - starts + 1
    # Blocks mostly share one mask; each different one is computed once.
    masks, times = np.unique(run["mask"].values, axis=0, return_counts=True)
    total = np.zeros((len(starts), len(starts)))
    for mask, weight in zip(masks, times, strict=True):
        total += weight * _interval_sums(jaccard(mask), starts)
    matrix = total / times.sum() / np.outer(widths, widths)
    return _task_matrix(run, matrix, "mask overlap").assign_attrs(long_name="Jaccard index of channel masks")


def jaccard(sets: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """|A and B| / |A or B| of every two rows of (N, C) booleans, (N, N); 1 for two empty sets, which are equal."""
    member = sets.astype(np.float32)  # counts up to 2^24 are exact, and float32 products use BLAS
    both = (member @ member.T).astype(float)
    size = both.diagonal()
    either = size[:, None] + size[None, :] - both
    return np.divide(both, either, out=np.ones_like(both), where=either > 0)


def _interval_sums(matrix: npt.NDArray[np.float64], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)


def _task_matrix(run: xr.Dataset, values: npt.NDArray[np.float64], name: str) -> xr.DataArray:
    dims = {"task", "other_task"}
    coords = {key: coord for key, coord in run.coords.items() if coord.dims and set(coord.dims) <= dims}
    return xr.DataArray(values, dims=("task", "other_task"), coords=coords, name=name)


@dataclasses.dataclass(frozen=True)
class RankCorrelation:
    """Agreement of two matrices.

    Attributes:
        correlation: Spearman's rank correlation over the pairs of tasks, in [-1, 1].
        p_value: Two-sided permutation p-value.
        pairs: Pairs of tasks defined in both matrices.
    """

    correlation: float
    p_value: float
    pairs: int


def rank_correlation(
    first: xr.DataArray, second: xr.DataArray, *, permutations: int = 9999, seed: int = 0
) -> RankCorrelation:
    """Mantel test: Spearman correlation of two symmetric matrices, tasks permuted jointly (Mantel 1967).

    The cells of a matrix share tasks, so they must not be permuted on their own. A caveat: neighbouring intervals are
    alike in nearly any affinity, so two matrices can agree merely because both fall with the distance in t.

    Args:
        first: (task, other_task), symmetric; the diagonal is not used.
        second: Likewise, on the same tasks.
        permutations: Random permutations of the tasks; the smallest possible p-value is 1 / (permutations + 1).
        seed: Of the permutations' own generator.

    Raises:
        ValueError: If the matrices are not over the same tasks, or fewer than three pairs are defined in both.
    """
    if first.dims != ("task", "other_task") or first.sizes != second.sizes:
        raise ValueError(f"two (task, other_task) matrices are needed, got {first.sizes} and {second.sizes}")
    size = first.sizes["task"]
    above = np.triu_indices(size, 1)
    left, right = first.values[above], second.values
    defined = np.isfinite(left) & np.isfinite(right[above])
    if defined.sum() < 3:
        raise ValueError(f"only {defined.sum()} pairs of tasks are defined in both matrices, at least 3 are needed")
    observed = _spearman(left, right[above])
    rng = np.random.default_rng(seed)
    as_extreme = 0
    for _ in range(permutations):
        order = rng.permutation(size)
        # Rounding must not make a permutation that changes nothing less extreme than what was observed.
        as_extreme += abs(_spearman(left, right[np.ix_(order, order)][above])) >= abs(observed) - 1e-12
    return RankCorrelation(observed, (as_extreme + 1) / (permutations + 1), int(defined.sum()))


def _spearman(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float:
    """Correlation of the ranks of the pairs defined on both sides; 0 if either side is constant."""
    defined = np.isfinite(left) & np.isfinite(right)
    ranks = stats.rankdata(left[defined]), stats.rankdata(right[defined])
    centred = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float(centred[0] @ centred[1] / scale) if scale > 0 else 0.0
