"""Curves against what training costs: steps, samples seen, time in training steps, floating-point operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import RunManifest

Axis = Literal["step", "samples", "seconds", "flops"]
AXES: tuple[Axis, ...] = get_args(Axis)
CURVE_COLUMNS = ["run", "method", "seed", *AXES, "metric", "value"]

FloatArray = npt.NDArray[np.float64]

_CURES = {
    "seconds": "its training time was not measured (runs of earlier versions), or it stopped before it was first "
    "written: train it again",
    "flops": "its manifest has no flops_per_sample (runs of earlier versions, models that were not counted): train it "
    "again",
}


class Curve(NamedTuple):
    """One metric of one method and seed.

    Attributes:
        x: (N,) positions on an axis, increasing.
        value: (N,); NaN where the run had diverged.
    """

    x: FloatArray
    value: FloatArray


SeedCurves = dict[tuple[str, int], Curve]
"""The curves of one metric by (method, seed)."""


def add_axes(curves: pd.DataFrame, runs: Sequence[xr.Dataset]) -> pd.DataFrame:
    """Gives curves the other axes, so that they can be compared at equal cost and not only at equal steps.

    Args:
        curves: Columns run, method, seed, step, metric, value: of `frames.curves_frame`, or any logged metric.
        runs: The runs that these are curves of, and maybe others.

    Returns:
        Columns `CURVE_COLUMNS`. ``samples`` are steps times the batch size; ``flops`` are those samples' forward and
        backward passes; ``seconds`` are spent in training steps, interpolated linearly between the clock's readings
        and 0 at step 0. NaN where a run has no clock or count, and beyond its last reading: nothing is extrapolated.

    Raises:
        ValueError: If a curve belongs to none of the runs.
    """
    by_id = {run.attrs["run_id"]: run for run in runs}
    places = curves.groupby("run", sort=False).indices
    missing = [str(name) for name in places if name not in by_id]
    if missing:
        raise ValueError(f"there are curves of runs {missing}, which are not among the runs given: pass them, too")
    step = curves["step"].to_numpy(dtype=float)
    filled = {name: np.full(len(curves), np.nan) for name in AXES[1:]}
    for name, rows in places.items():
        run = by_id[str(name)]
        manifest = RunManifest.from_json(run.attrs["manifest"])
        filled["samples"][rows] = step[rows] * manifest.batch_size
        if manifest.flops_per_sample is not None:
            filled["flops"][rows] = filled["samples"][rows] * manifest.flops_per_sample
        if "training_seconds" in run:
            clock = np.concatenate([[0.0], run["clock_step"].values])
            seconds = np.concatenate([[0.0], run["training_seconds"].values])
            filled["seconds"][rows] = np.interp(step[rows], clock, seconds, right=np.nan)
    return curves.assign(**filled)[CURVE_COLUMNS]


def known_axes(curves: pd.DataFrame) -> list[Axis]:
    """The axes that all runs of these curves can be drawn against."""
    present = [name for name in AXES if name in curves]
    known = curves.groupby("run")[present].count() > 0
    return [name for name in present if known[name].all()]


def seed_curves(curves: pd.DataFrame, metric: str, axis: Axis = "step") -> SeedCurves:
    """The curve of every method and seed in one metric.

    Measurements beyond the last reading of a run's clock have no place on the axis ``seconds`` and are left out.

    Args:
        curves: Tidy frame; without the columns of `add_axes` only the axis ``step`` is there.
        metric: One of its metrics.
        axis: What to draw it against.

    Returns:
        Ordered by method and seed. Where a method has several runs with one seed: the mean over those measured at a
        step, NaN if any of them is, for leaving out the diverged would flatter the method.

    Raises:
        ValueError: If there is no such column.
        UserInputError: If a run cannot be placed on the axis.
    """
    if axis not in curves:
        raise ValueError(f"these curves have no column {axis!r}: put them through axes.add_axes(curves, runs) first")
    own = curves[curves["metric"] == metric]
    x = own[axis].to_numpy(dtype=float)
    if np.isnan(x).any():
        _check_placed(own.assign(x=x), axis)
        own, x = own[~np.isnan(x)], x[~np.isnan(x)]
    step, value = own["step"].to_numpy(dtype=float), own["value"].to_numpy(dtype=float)
    places = cast("dict[tuple[str, int], npt.NDArray[np.intp]]", own.groupby(["method", "seed"]).indices)
    return {
        (str(method), int(seed)): _one_curve(step[rows], x[rows], value[rows])
        for (method, seed), rows in places.items()
    }


def paired_curves(found: SeedCurves, method: str, baseline: str) -> dict[int, tuple[Curve, Curve]]:
    """The curves of a method and of the baseline, by the seeds that both have."""
    return {
        seed: (curve, found[baseline, seed])
        for (name, seed), curve in found.items()
        if name == method and (baseline, seed) in found
    }


def _one_curve(step: FloatArray, x: FloatArray, value: FloatArray) -> Curve:
    """The measurements of one method and seed, in order; NaN stays in the mean over those of one step."""
    if not (np.diff(step) > 0).all():  # several runs, or rows in another order
        _, place, number = np.unique(step, return_inverse=True, return_counts=True)
        x, value = (np.bincount(place, each) / number for each in (x, value))
    order = np.argsort(x, kind="stable")
    return Curve(x[order], value[order])


def _check_placed(table: pd.DataFrame, axis: Axis) -> None:
    placed = table.groupby("run")["x"].count()
    unplaced = placed.index[placed == 0]
    if len(unplaced):
        first = table[table["run"] == unplaced[0]].iloc[0]
        others = f" and {len(unplaced) - 1} more" if len(unplaced) > 1 else ""
        raise UserInputError(
            f"run {first['run']} ({first['method']}, seed {first['seed']}){others} cannot be compared by {axis}: "
            f"{_CURES.get(axis, 'it has no position there')}, or compare by another axis (axis='step')"
        )
