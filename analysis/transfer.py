"""What training on one task does to another, measured by doing it: one step (look-ahead), or many (fine-tuning).

Every function returns an affinity in the form of `affinity`: (task, other_task), from the task trained on to the task
whose loss is looked at, larger is more helpful. `specialists` goes furthest: a whole training on one task.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import FINE_TUNING, LOOK_AHEAD

_CURE = {
    LOOK_AHEAD: "`dtr-lab affinity CHECKPOINT --measures look_ahead`",
    FINE_TUNING: "`dtr-lab affinity CHECKPOINT --measures fine_tuning`",
}
_PAIR = ("task", "other_task")


def look_ahead_affinity(run: xr.Dataset, *, step: int | None = None) -> xr.DataArray:
    """Task affinity grouping's Z_{i→j} = 1 - L_j(θ - η g_i) / L_j(θ), measured by taking the step.

    Source: Fifty et al. (arXiv 2109.04617), equation 1; averaged over the measured checkpoints as theirs over training.

    Args:
        run: A run with measured look-aheads.
        step: Of one checkpoint; all of them without it.

    Returns:
        (task, other_task), with ``standard_error`` from leaving out one draw of samples at a time (NaN for one draw).

    Raises:
        UserInputError: If nothing was measured, or not at that step.
    """
    return _affinity(run, LOOK_AHEAD, "change", step, None, "measured look-ahead")


def predicted_look_ahead(run: xr.Dataset, *, step: int | None = None) -> xr.DataArray:
    """The first-order form η <g_i, g_j> / L_j of `look_ahead_affinity`, for the same samples and the same step.

    The difference between the two is curvature: where it is large, gradients alone do not tell who helps whom.

    Raises:
        UserInputError: As `look_ahead_affinity`; also if the steps were not plain gradient descent.
    """
    found = _affinity(run, LOOK_AHEAD, "predicted", step, None, "first-order look-ahead")
    if found.isnull().all():
        raise UserInputError(
            f"the look-aheads of run {run.attrs.get('name', '')} have no first-order form: it exists for plain "
            "gradient descent on models that the Gramian covers (`dtr-lab affinity CHECKPOINT --optimizer sgd`)"
        )
    return found


def fine_tuning_affinity(run: xr.Dataset, *, updates: int | None = None, step: int | None = None) -> xr.DataArray:
    """1 - L_j(after) / L_j(before) of fine-tuning on task i: Min-SNR's figure 2 for all pairs.

    Args:
        run: A run with measured fine-tunings.
        updates: After so many; the most that were made without it.
        step: Of one checkpoint; all of them without it.

    Returns:
        (task, other_task), with ``standard_error`` from leaving out one draw of samples at a time (NaN for one draw).

    Raises:
        UserInputError: If nothing was measured, or not at that step or number of updates.
    """
    return _affinity(run, FINE_TUNING, "change", step, updates, "fine-tuning transfer")


def relative_to_own(affinity: xr.DataArray) -> xr.DataArray:
    """How much training on i helps j, as a share of what training on j itself does: Z_{i→j} / Z_{j→j}.

    Losses of different intervals differ by orders of magnitude, and so do the shares of them that a step removes; this
    way all columns have one scale, with 1 on the diagonal.

    Args:
        affinity: (..., task, other_task), directed.

    Returns:
        Likewise; NaN in the columns of tasks that training on themselves does not help, and the ``standard_error``, if
        there is one, of the numerator alone.
    """
    at = xr.DataArray(np.arange(affinity.sizes["task"]), dims="other_task")
    own = affinity.isel(task=at).drop_vars([name for name in affinity.coords if name not in affinity.dims])
    own = own.drop_vars("task", errors="ignore").where(lambda value: value > 0)
    relative = affinity / own
    if "standard_error" in affinity.coords:
        error = affinity["standard_error"].drop_vars(list(affinity["standard_error"].coords)) / own.drop_vars(
            list(own.coords)
        )
        relative = relative.assign_coords(standard_error=error.transpose(*affinity["standard_error"].dims))
    return relative.transpose(*affinity.dims).assign_attrs({**affinity.attrs, "long_name": "help relative to its own"})


def transfer_film(run: xr.Dataset, measure: str = LOOK_AHEAD) -> xr.DataArray:
    """A measured affinity of every checkpoint: (step, task, other_task).

    Raises:
        UserInputError: If nothing was measured.
    """
    _check(run, measure)
    steps = run[f"{measure}_step"].values.tolist()
    name = "measured look-ahead" if measure == LOOK_AHEAD else "fine-tuning transfer"
    films = [_affinity(run, measure, "change", step, None, name) for step in steps]
    return xr.concat(films, pd.Index(steps, name="step"), join="exact", combine_attrs="override")


def _affinity(
    run: xr.Dataset, measure: str, part: str, step: int | None, updates: int | None, name: str
) -> xr.DataArray:
    _check(run, measure)
    chosen = run[[f"{measure}_{each}" for each in ("before", "count", part)]]
    if step is not None:
        chosen = _at(chosen, f"{measure}_step", [step], run)
    made = int(run[f"{measure}_updates"][-1]) if updates is None else updates
    chosen = _at(chosen, f"{measure}_updates", [made], run).squeeze(f"{measure}_updates", drop=True)
    before, count, change = (chosen[f"{measure}_{each}"].transpose(..., *_PAIR) for each in ("before", "count", part))
    if part == "predicted":  # a mean, where the others are sums
        change = change * count
    repeat, steps = f"{measure}_repeat", f"{measure}_step"
    by_step = -change.sum(repeat, min_count=1) / before.sum(repeat, min_count=1)
    error = _jackknife(change, before, repeat)
    value = by_step.mean(steps).rename(name)
    value = value.drop_vars([coord for coord in value.coords if not set(value[coord].dims) & set(_PAIR)])
    pooled = ((error**2).sum(steps, skipna=False) ** 0.5 / by_step.sizes[steps]).transpose(*_PAIR).values
    return value.assign_coords(standard_error=(_PAIR, pooled)).assign_attrs(
        long_name="relative decrease of the loss", directed=True, units=int(chosen.sizes[repeat])
    )


def _jackknife(change: xr.DataArray, before: xr.DataArray, repeat: str) -> xr.DataArray:
    """Standard error over repeats of the ratio of sums, leaving out one repeat at a time."""
    known = before.notnull()
    repeats = known.sum(repeat)
    without = -(change.sum(repeat) - change.fillna(0.0)) / (before.sum(repeat) - before.fillna(0.0))
    without = without.where(known)
    spread = ((without - without.mean(repeat)) ** 2).sum(repeat)
    return ((repeats - 1) / repeats * spread).where(repeats > 1) ** 0.5


def _check(run: xr.Dataset, measure: str) -> None:
    if f"{measure}_change" not in run:
        raise UserInputError(
            f"run {run.attrs.get('name', '')} has no measured {measure.replace('_', ' ')}: measure it with "
            f"{_CURE[measure]}"
        )


def _at(data: xr.Dataset, dim: str, values: list[int], run: xr.Dataset) -> xr.Dataset:
    known = data[dim].values.tolist()
    if not set(values) <= set(known):
        raise UserInputError(
            f"run {run.attrs.get('name', '')} has {dim.replace('_', ' ')} {', '.join(map(str, known))}, not "
            f"{', '.join(map(str, values))}"
        )
    return data.sel({dim: values})
