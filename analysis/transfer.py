"""What training on one task does to another, measured by doing it: one step (look-ahead), or many (fine-tuning).

Every function returns an affinity in the form of `affinity`: (task, other_task), from the task trained on to the task
whose loss is looked at, larger is more helpful. `specialists` goes furthest: a whole training on one task.

Errors of one run come from leaving out one draw of samples at a time: they speak about these weights. Errors of several
runs come from leaving out one run at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from scipy import stats

from analysis.grouping import Runs, as_list
from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import FINE_TUNING, LOOK_AHEAD

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Form = Callable[[FloatArray], FloatArray]

_CURE = {
    LOOK_AHEAD: "`dtr-lab affinity CHECKPOINT --measures look_ahead`",
    FINE_TUNING: "`dtr-lab affinity CHECKPOINT --measures fine_tuning`",
}
_NAME = {LOOK_AHEAD: "measured look-ahead", FINE_TUNING: "fine-tuning transfer"}
_PAIR = ("task", "other_task")
_OWN_LEVEL = 0.95
"""Confidence with which training on a task must help it, for other effects to be told as shares of that."""


def look_ahead_affinity(runs: Runs, *, step: int | None = None, relative: bool = False) -> xr.DataArray:
    """Task affinity grouping's Z_{i→j} = 1 - L_j(θ - η g_i) / L_j(θ), measured by taking the step.

    Source: Fifty et al. (arXiv 2109.04617), equation 1; averaged over the measured checkpoints as theirs over training.

    Args:
        runs: With measured look-aheads, over the same intervals.
        step: Of one checkpoint; all of them without it.
        relative: Whether to divide by what training on j itself does, Z_{j→j}. Losses of different intervals differ by
            orders of magnitude, and so do the shares of them that a step removes; this way all columns have one scale,
            with 1 on the diagonal. Columns of tasks whose own effect cannot be told from zero are NaN.

    Returns:
        (task, other_task), with ``standard_error`` (NaN for one draw of one run).

    Raises:
        UserInputError: If nothing was measured, or not at that step.
    """
    return _affinity(runs, LOOK_AHEAD, "change", step, None, relative)


def predicted_look_ahead(runs: Runs, *, step: int | None = None) -> xr.DataArray:
    """The first-order form η <g_i, g_j> / L_j of `look_ahead_affinity`, for the same samples and the same step.

    The difference between the two is curvature: where it is large, gradients alone do not tell who helps whom.

    Raises:
        UserInputError: As `look_ahead_affinity`; also if the steps were not plain gradient descent.
    """
    found = _affinity(runs, LOOK_AHEAD, "predicted", step, None, False)
    if found.isnull().all():
        raise UserInputError(_no_first_order(as_list(runs)[0]))
    return found.rename("first-order look-ahead")


def first_order_slope(runs: Runs, *, step: int | None = None) -> float:
    """Measured look-aheads over those that gradients predict: the slope of a line through the origin, by least squares.

    1 where the first order is all there is, less where curvature takes some of it back.

    Raises:
        UserInputError: As `predicted_look_ahead`.
    """
    parts = ("change", "predicted")
    each = [[_draws(run, LOOK_AHEAD, part, step, None).value for part in parts] for run in as_list(runs)]
    real, first = np.mean(each, axis=0)
    known = np.isfinite(real) & np.isfinite(first)
    if not known.any():
        raise UserInputError(_no_first_order(as_list(runs)[0]))
    return float((real[known] * first[known]).sum() / (first[known] ** 2).sum())


def fine_tuning_affinity(
    runs: Runs, *, updates: int | None = None, step: int | None = None, relative: bool = False
) -> xr.DataArray:
    """1 - L_j(after) / L_j(before) of fine-tuning on task i: Min-SNR's figure 2 for all pairs.

    Args:
        runs: With measured fine-tunings, over the same intervals.
        updates: After so many; the most that were made without it.
        step: As of `look_ahead_affinity`.
        relative: Likewise.

    Returns:
        (task, other_task), with ``standard_error`` (NaN for one draw of one run).

    Raises:
        UserInputError: If nothing was measured, or not at that step or number of updates.
    """
    return _affinity(runs, FINE_TUNING, "change", step, updates, relative)


def transfer_film(runs: Runs, measure: str = LOOK_AHEAD, *, relative: bool = False) -> xr.DataArray:
    """A measured affinity of every checkpoint that all runs were measured at, in the form of `affinity.affinity_film`.

    Args:
        runs: With measurements, over the same intervals.
        measure: ``records.LOOK_AHEAD`` or ``records.FINE_TUNING``.
        relative: As of `look_ahead_affinity`.

    Returns:
        (window, task, other_task) with the coordinates ``first_step`` and ``last_step``, both the checkpoint's.

    Raises:
        UserInputError: If nothing was measured, or at no step in all runs.
    """
    listed = as_list(runs)
    for run in listed:
        _check(run, measure)
    steps = sorted(set.intersection(*(set(run[f"{measure}_step"].values.tolist()) for run in listed)))
    if not steps:
        raise UserInputError(f"the runs' {measure.replace('_', ' ')} was measured at no step that all have: measure it")
    frames = [_affinity(runs, measure, "change", step, None, relative) for step in steps]
    film = xr.concat(frames, pd.RangeIndex(len(steps), name="window"), join="exact", combine_attrs="override")
    return film.drop_vars("window").assign_coords(first_step=("window", steps), last_step=("window", steps))


@dataclasses.dataclass(frozen=True)
class _Draws:
    """A run's affinity, and what it would be without one draw of samples at one checkpoint.

    Attributes:
        value: (K, K) from the task trained on to the one affected, mean over checkpoints.
        without: (checkpoint, repeat, K, K), NaN for draws that there are not.
        draws: (checkpoint, K, K) how many there are.
    """

    value: FloatArray
    without: FloatArray
    draws: IntArray

    @property
    def repeats(self) -> int:
        return self.without.shape[1]

    def variance(self, form: Form) -> FloatArray:
        """Jackknife over draws, checkpoint by checkpoint, of what a form makes of `without`; NaN for one draw."""
        values = form(self.without)
        number = self.draws
        mean = np.nansum(values, axis=1) / np.maximum(np.isfinite(values).sum(1), 1)
        spread = np.nansum((values - mean[:, None]) ** 2, axis=1)
        share = np.where(number == 1, np.nan, (number - 1) / np.maximum(number, 1))
        return np.where(number > 0, share * spread, 0.0).sum(0)  # a checkpoint may lack this measurement


def _affinity(
    runs: Runs, measure: str, part: str, step: int | None, updates: int | None, relative: bool
) -> xr.DataArray:
    listed = as_list(runs)
    each = [_draws(run, measure, part, step, updates) for run in listed]
    by_run = np.stack([draws.value for draws in each])
    mean, count = by_run.mean(0), len(each)
    form = _share_of_own(mean, each) if relative else _as_it_is
    if count == 1:
        units, variance = each[0].repeats, each[0].variance(form)
    else:
        left_out = form((count * mean - by_run) / (count - 1))
        units, variance = count, (count - 1) / count * ((left_out - left_out.mean(0)) ** 2).sum(0)
    tasks = {name: coord for name, coord in listed[0].coords.items() if coord.dims in (_PAIR[:1], _PAIR[1:])}
    value = xr.DataArray(form(mean), tasks, _PAIR, name=_NAME[measure])
    error = np.where(np.isfinite(value.values), np.sqrt(variance), np.nan)
    said = "help relative to its own" if relative else "relative decrease of the loss"
    return value.assign_coords(standard_error=(_PAIR, error)).assign_attrs(long_name=said, directed=True, units=units)


def _draws(run: xr.Dataset, measure: str, part: str, step: int | None, updates: int | None) -> _Draws:
    """What was measured of a run, in one form for all measures."""
    _check(run, measure)
    made = int(run[f"{measure}_updates"][-1]) if updates is None else updates
    at_updates = _place(run, f"{measure}_updates", made)
    at_step = slice(None) if step is None else [_place(run, f"{measure}_step", step)]
    dims = (*(f"{measure}_{dim}" for dim in ("updates", "step", "repeat")), *_PAIR)
    before, number, change = (
        run.variables[f"{measure}_{name}"].transpose(*dims).values[at_updates][at_step]
        for name in ("before", "count", part)
    )
    if part == "predicted":  # a mean, where the others are sums
        change = change * number
    measured = np.isfinite(before)
    saved, loss = np.where(measured, -change, 0.0), np.where(measured, before, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_step = saved.sum(1) / loss.sum(1)
        without = (saved.sum(1, keepdims=True) - saved) / (loss.sum(1, keepdims=True) - loss)
    # Checkpoints may have been measured after other numbers of updates, or without a prediction.
    there = np.isfinite(by_step).sum(0)
    value = np.divide(np.nansum(by_step, axis=0), there, out=np.full(there.shape, np.nan), where=there > 0)
    moved = value + (without - by_step[:, None]) / np.maximum(there, 1)
    return _Draws(value, np.where(measured, moved, np.nan), measured.sum(1))


def _share_of_own(mean: FloatArray, each: Sequence[_Draws]) -> Form:
    """Divides the columns of an affinity by its own diagonal, where that of the mean over runs is beyond noise.

    The noise that counts is that of the measurement, over draws of samples: runs may well differ in a true effect.
    """
    own = np.diagonal(mean)
    repeated = [draws for draws in each if draws.repeats > 1]
    least = np.zeros_like(own)  # single draws have no error, and are taken as they are
    if repeated:
        variance = sum(np.diagonal(draws.variance(_as_it_is)) for draws in repeated) / len(repeated) ** 2
        freedom = sum(draws.repeats - 1 for draws in repeated)
        least = np.nan_to_num(stats.t.ppf(_OWN_LEVEL, freedom) * np.sqrt(variance))
    defined = own > least

    def form(values: FloatArray) -> FloatArray:
        diagonal = np.diagonal(values, axis1=-2, axis2=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return values / np.where(defined, diagonal, np.nan)[..., None, :]

    return form


def _as_it_is(values: FloatArray) -> FloatArray:
    return values


def _no_first_order(run: xr.Dataset) -> str:
    return (
        f"the look-aheads of run {run.attrs.get('name', '')} have no first-order form: it exists for plain gradient "
        "descent on models that the Gramian covers (`dtr-lab affinity CHECKPOINT --optimizer sgd`)"
    )


def _check(run: xr.Dataset, measure: str) -> None:
    if f"{measure}_change" not in run:
        raise UserInputError(
            f"run {run.attrs.get('name', '')} has no measured {measure.replace('_', ' ')}: measure it with "
            f"{_CURE[measure]}"
        )


def _place(run: xr.Dataset, dim: str, value: int) -> int:
    known = run[dim].values.tolist()
    if value not in known:
        listed = ", ".join(map(str, known))
        raise UserInputError(f"run {run.attrs.get('name', '')} has {dim.replace('_', ' ')} {listed}, not {value}")
    return known.index(value)
