"""Task-affinity matrices, all in one form, over a whole training or window by window.

Every matrix is an `xarray.DataArray` (task, other_task), from the task that is trained on to the task that is affected,
larger where that helps more. It has the interval coordinates of the run (labels, bounds in t, log-SNR) and NaN where
nothing can be said; where its error is known, the coordinate ``standard_error`` (task, other_task). Attributes:
``long_name``; ``directed``, whether (i, j) and (j, i) are different quantities; and beside an error ``units``, the
number of independent parts it comes from, so that Student's t has one degree of freedom fewer.

More such matrices are in `transfer`, `specialists` and `representation`; `agreement` compares them, `clustering` finds
the intervals that they suggest.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import stats

from analysis.conflict import corrected_cosine, plain_cosine
from analysis.gramians import STEP, Level, join_probes, pool_runs
from analysis.grouping import Runs, as_list, stack_runs
from analysis.jackknife import Errors
from analysis.significance import FALSE_DISCOVERY_RATE
from analysis.update import first_order_tag

"""One run, or several whose probes are pooled."""
_ERROR = "standard_error"
_PAIR = ("task", "other_task")


def gradient_affinity(
    runs: Runs, *, corrected: bool = True, level: Level = "total", errors: Errors = "probes"
) -> xr.DataArray:
    """Cosine between the gradients of two tasks, over all probes.

    Args:
        runs: With gradient probes. Restrict the part of training with ``run.sel(gradient_step=slice(a, b))``, or take
            `affinity_film`.
        corrected: Whether to take the noise out (`conflict.corrected_cosine`) or to show the plain cosine of the
            averaged Gramian, which noise draws towards zero.
        level: Over all parameters, or with a leading dimension ``block`` or ``layer``.
        errors: Over probes (of these networks), or over runs.

    Returns:
        (task, other_task), or (block | layer, task, other_task), symmetric, with ``standard_error``.

    Raises:
        UserInputError: If a run has no gradient probes, or errors over runs are asked of a single one.
    """
    gramian, count = pool_runs(as_list(runs), level)
    found = (corrected_cosine if corrected else plain_cosine)(gramian, count, errors=errors)
    matrix = _with_error(found, "cosine", "gradient affinity")
    return matrix.assign_attrs(long_name="gradient cosine", directed=False, corrected=corrected)


def tag_affinity(
    runs: Runs,
    learning_rate: float | xr.DataArray,
    *,
    relative: bool = False,
    level: Level = "total",
    errors: Errors = "probes",
) -> xr.DataArray:
    """Task affinity grouping to first order: the share of a task's loss that a step on another removes.

    Unlike `gradient_affinity` it is directed and knows how large gradients and losses are: an interval with large
    gradients moves all others, and intervals with small losses are moved most.

    Args:
        runs: With gradient probes.
        learning_rate: Of plain gradient descent; one number or one for every probe (gradient_step).
        relative: Whether to tell effects as shares of what a step on the affected task itself does: 1 on the diagonal,
            one scale for all columns. NaN in the columns of tasks whose gradient cannot be told from noise.
        level: Over all parameters, or the part that each block or layer contributes.
        errors: Over probes (of these networks), or over runs.

    Returns:
        (task, other_task), or with a leading ``block`` or ``layer``, with ``standard_error``.

    Raises:
        UserInputError: If a run has no gradient probes, or errors over runs are asked of a single one.
    """
    gramian, count = pool_runs(as_list(runs), level)
    loss = join_probes([run["group_loss"] for run in as_list(runs)])
    rate = learning_rate
    if isinstance(rate, xr.DataArray):  # steps occur once in every run, so they are no index to align on
        rate = xr.DataArray(rate.sel({STEP: gramian[STEP].values}).values, dims=STEP)
    found = first_order_tag(gramian, count, loss, rate, relative=relative, errors=errors)
    matrix = _with_error(found, "affinity", "TAG affinity")
    said = "help relative to its own" if relative else "relative decrease of the loss"
    return matrix.assign_attrs(long_name=said, directed=True)


def affinity_film(
    runs: Runs, measure: Callable[[Sequence[xr.Dataset]], xr.DataArray], *, windows: int = 8
) -> xr.DataArray:
    """An affinity in consecutive windows of training, each with about as many gradient probes.

    Args:
        runs: With gradient probes; their probes of the same steps are pooled. A run that ended before a window began
            is not in it.
        measure: From runs to the affinity; they are given with the probes of one window only. For task affinity
            grouping ``functools.partial(tag_affinity, learning_rate=1e-4)``.
        windows: How many.

    Returns:
        (window, task, other_task) with the coordinates ``first_step`` and ``last_step`` (window), of the first and the
        last probe of each window. ``units`` are those of the window that has the fewest.

    Raises:
        UserInputError: If a run has no gradient probes.
        ValueError: If there are fewer steps with probes than windows.
    """
    # Without what is no part of a probe: each window takes a slice of all the rest.
    listed = [run[[name for name, each in run.data_vars.items() if STEP in each.dims]] for run in as_list(runs)]
    steps = np.unique(np.concatenate([run[STEP].values for run in listed]))
    if not 1 <= windows <= len(steps):
        raise ValueError(f"windows must lie in 1..{len(steps)}, the number of probed steps; got {windows}")
    parts = [part[[0, -1]] for part in np.array_split(steps, windows)]
    frames = []
    for first, last in parts:
        inside = [run.sel({STEP: slice(first, last)}) for run in listed]
        frames.append(measure([run for run in inside if run.sizes[STEP]]))
    film = xr.concat(frames, "window", coords=[_ERROR] if _ERROR in frames[0].coords else "minimal", compat="override")
    edges = np.asarray(parts)
    units = {"units": min(frame.attrs["units"] for frame in frames)} if "units" in frames[0].attrs else {}
    return film.assign_coords(first_step=("window", edges[:, 0]), last_step=("window", edges[:, 1])).assign_attrs(
        {**frames[0].attrs, **units}
    )


def gradient_affinity_film(runs: Runs, *, windows: int = 8, corrected: bool = True) -> xr.DataArray:
    """`affinity_film` of `gradient_affinity`: (window, task, other_task)."""
    return affinity_film(runs, functools.partial(gradient_affinity, corrected=corrected), windows=windows)


def mean_over_runs(matrices: Sequence[xr.DataArray]) -> xr.DataArray:
    """Mean of one affinity per run (seed), with the standard error over runs.

    Weak gradients are better pooled: `gradient_affinity` of several runs needs them to stand out of the noise together,
    not in each run.

    Args:
        matrices: One per run, all of the same form, also with leading dimensions.

    Returns:
        Likewise. NaN where it is undefined in any run: a mean over those in which it could be measured would be one
        over a selection. ``standard_error`` is NaN for one run.
    """
    stacked = stack_runs([matrix.drop_vars(_ERROR, errors="ignore") for matrix in matrices])
    count = stacked.sizes["run"]
    mean = stacked.mean("run", skipna=False).assign_attrs(matrices[0].attrs)
    error = stacked.std("run", ddof=1, skipna=False) / np.sqrt(count) if count > 1 else mean * np.nan
    return mean.assign_coords({_ERROR: (mean.dims, error.transpose(*mean.dims).values)}).assign_attrs(units=count)


def significant_cells(matrix: xr.DataArray, false_discovery_rate: float = FALSE_DISCOVERY_RATE) -> xr.DataArray:
    """Cells off the diagonal that differ from zero.

    A cell is marked if its value exceeds Student's t-quantile times its standard error, the quantile being the one that
    controls the false discovery rate over all cells (Benjamini and Hochberg, Journal of the Royal Statistical Society B
    57, 1995), those of leading dimensions included. Both cells of an undirected pair are one test.

    Args:
        matrix: An affinity with ``standard_error``. Without the attribute ``units`` the normal quantile is taken.
        false_discovery_rate: Expected share of false findings among the cells marked.

    Returns:
        Booleans of the same form; False where the error is not known.

    Raises:
        ValueError: If it has no errors.
    """
    if _ERROR not in matrix.coords:
        raise ValueError(f"the affinity {matrix.name!r} has no standard errors, so nothing is known to be significant")
    size = matrix.sizes["task"]
    tested = np.nonzero(~np.eye(size, dtype=bool) if matrix.attrs["directed"] else np.triu(np.ones((size, size)), 1))
    values = matrix.transpose(..., *_PAIR).values[..., tested[0], tested[1]]
    error = matrix[_ERROR].transpose(..., *_PAIR).values[..., tested[0], tested[1]]
    score = np.divide(values, error, out=np.full_like(values, np.nan), where=error > 0)
    known = np.isfinite(score)
    p_value = 2 * stats.t.sf(np.abs(score[known]), matrix.attrs.get("units", np.inf) - 1)
    found = np.zeros(known.shape, dtype=bool)
    if p_value.size:
        found[known] = stats.false_discovery_control(p_value) <= false_discovery_rate
    marked = np.zeros((*known.shape[:-1], size, size), dtype=bool)
    marked[..., tested[0], tested[1]] = found
    if not matrix.attrs["directed"]:
        marked |= marked.swapaxes(-1, -2)
    return matrix.transpose(..., *_PAIR).copy(data=marked).drop_vars(_ERROR)


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
    times = Counter(mask.tobytes() for mask in run["mask"].values)
    starts = tuple(run["t_low"].values.tolist())
    total = sum(number * _interval_overlap(mask, run.sizes["timestep"], starts) for mask, number in times.items())
    matrix = np.asarray(total) / times.total()
    overlap = _task_matrix(run, matrix, "mask overlap")
    return overlap.assign_attrs(long_name="Jaccard index of channel masks", directed=False)


def jaccard(sets: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """|A and B| / |A or B| of every two rows of (N, C) booleans, (N, N); 1 for two empty sets, which are equal."""
    member = sets.astype(np.float32)  # counts up to 2^24 are exact, and float32 products use BLAS
    both = (member @ member.T).astype(float)
    size = both.diagonal()
    either = size[:, None] + size[None, :] - both
    return np.divide(both, either, out=np.ones_like(both), where=either > 0)


@functools.lru_cache(maxsize=64)
def _interval_overlap(mask: bytes, num_timesteps: int, starts: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Mean `jaccard` of the timesteps of two intervals; most blocks share one mask, and so do most runs of a method."""
    sets = np.frombuffer(mask, dtype=bool).reshape(num_timesteps, -1)
    sums = np.add.reduceat(np.add.reduceat(jaccard(sets), starts, axis=0), starts, axis=1)
    widths = np.diff([*starts, num_timesteps])
    return sums / np.outer(widths, widths)


def _task_matrix(run: xr.Dataset, values: npt.NDArray[np.float64], name: str) -> xr.DataArray:
    coords = {key: coord for key, coord in run.coords.items() if coord.dims and set(coord.dims) <= set(_PAIR)}
    return xr.DataArray(values, dims=_PAIR, coords=coords, name=name)


def _with_error(found: xr.Dataset, value: str, name: str) -> xr.DataArray:
    """A statistic in the common form, from the Dataset that knows its error."""
    matrix = found[value].transpose(..., *_PAIR).rename(name)
    error = found[_ERROR].transpose(*matrix.dims).values
    return matrix.assign_coords({_ERROR: (matrix.dims, error)}).assign_attrs(units=found.attrs["units"])
