"""How alike the network's representations are at different timesteps: linear CKA with the unbiased estimator.

What was measured, and how (residual stream behind each block, same images for all timesteps), is told in
`lightning_modules/representation.py`. DTR's figure 6 shows such matrices; it does not say how they were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr

from analysis.gramians import task_coordinates
from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import RunManifest

FloatArray = npt.NDArray[np.float64]
_TIMES = ("probed_timestep", "other_probed_timestep")
_PAIR = ("task", "other_task")


def timestep_cka(run: xr.Dataset, *, step: int | None = None) -> xr.DataArray:
    """CKA between timesteps for every block: HSIC(t, t') / sqrt(HSIC(t, t) HSIC(t', t')), of sums over batches.

    Source: Kornblith et al. (arXiv 1905.00414), equation 3; unbiased over minibatches: Nguyen et al. (arXiv
    2010.15327), equation 3. Estimates of near zero may be negative, and of near one exceed it.

    Args:
        run: A run with measured representations.
        step: Of one checkpoint; the last one without it.

    Returns:
        (block, probed_timestep, other_probed_timestep), NaN where a representation does not vary between images; with
        the coordinate ``log_snr`` on ``probed_timestep``.

    Raises:
        UserInputError: If nothing was measured, or not at that step.
    """
    measured = _measured(run, step)
    times = measured.timesteps
    return xr.DataArray(
        _cka(_total(measured.hsic)),
        dims=("block", *_TIMES),
        coords={
            "block": run["block"].values,
            _TIMES[0]: times,
            _TIMES[1]: times,
            "log_snr": (_TIMES[0], run["timestep_log_snr"].sel(timestep=times).values),
        },
        name="CKA",
        attrs={"long_name": "CKA"},
    )


def representation_affinity(run: xr.Dataset, *, step: int | None = None, by_block: bool = False) -> xr.DataArray:
    """Mean CKA over the probed timesteps of two intervals, averaged over blocks or for each.

    Args:
        run: A run with measured representations.
        step: Of one checkpoint; the last one without it.
        by_block: Whether to keep the dimension ``block``.

    Returns:
        (task, other_task), or with a leading ``block``: symmetric. The diagonal is the mean over *different* timesteps
        of an interval, 1 where only one was probed. Intervals without a probed timestep are NaN. ``standard_error``
        from leaving out one batch of images at a time (NaN for one batch).

    Raises:
        UserInputError: If nothing was measured, or not at that step.
    """
    measured = _measured(run, step)
    manifest = RunManifest.from_json(run.attrs["manifest"])
    bounds = manifest.interval_bounds
    total = _total(measured.hsic)
    value = _by_task(_cka(total), measured.timesteps, bounds)
    without = _by_task(_cka(total - np.nan_to_num(measured.hsic)), measured.timesteps, bounds)
    dims: tuple[str, ...] = ("block", *_PAIR)
    if not by_block:
        value, without, dims = _mean_over_blocks(value, 0), _mean_over_blocks(without, 1), _PAIR
    batches = len(measured.hsic)
    spread = ((without - without.mean(0)) ** 2).sum(0)
    error = np.sqrt((batches - 1) / batches * spread) if batches > 1 else np.full_like(value, np.nan)
    tasks = task_coordinates(bounds, manifest.log_snr).coords
    coords = {"block": run["block"].values} if by_block else {}
    matrix = xr.DataArray(value, dims=dims, coords=coords, name="representation similarity").assign_coords(tasks)
    return matrix.assign_coords(standard_error=(dims, error)).assign_attrs(
        long_name="CKA", directed=False, units=batches
    )


class _Measured(NamedTuple):
    """What was measured of one checkpoint, without what no batch had.

    Attributes:
        hsic: (batch, block, M, M).
        timesteps: (M,).
    """

    hsic: FloatArray
    timesteps: npt.NDArray[np.int64]


def _measured(run: xr.Dataset, step: int | None) -> _Measured:
    if "representation_hsic" not in run:
        raise UserInputError(
            f"run {run.attrs.get('name', '')} has no measured representations: measure them with "
            "`dtr-lab affinity CHECKPOINT --measures representation`"
        )
    known = run["representation_step"].values.tolist()
    if step is not None and step not in known:
        raise UserInputError(
            f"run {run.attrs.get('name', '')} has representations of step {', '.join(map(str, known))}, not {step}"
        )
    dims = ("representation_step", "representation_batch", "block", *_TIMES)
    hsic = (
        run.variables["representation_hsic"].transpose(*dims).values[known.index(known[-1] if step is None else step)]
    )
    there = np.isfinite(hsic)
    batch, time = there.any((1, 2, 3)), there.any((0, 1, 3))
    return _Measured(hsic[batch][:, :, time][..., time], run[_TIMES[0]].values[time])


def _total(hsic: FloatArray) -> FloatArray:
    """Sum over batches, NaN where none has a value."""
    return np.where(np.isfinite(hsic).any(0), np.nansum(hsic, axis=0), np.nan)


def _cka(hsic: FloatArray) -> FloatArray:
    """HSIC(t, t') / sqrt(HSIC(t, t) HSIC(t', t')) (..., M, M), NaN where a representation does not vary."""
    own = np.diagonal(hsic, axis1=-2, axis2=-1)
    norm = np.sqrt(np.where(own > 0, own, np.nan))
    return hsic / (norm[..., :, None] * norm[..., None, :])


def _by_task(cka: FloatArray, timesteps: npt.NDArray[np.int64], bounds: Sequence[int]) -> FloatArray:
    """Mean over the defined pairs of different timesteps of each two intervals: (..., K, K)."""
    task = np.searchsorted(bounds, timesteps, side="right") - 1
    count = len(bounds) - 1
    member = np.zeros((count, len(task)))
    member[task, np.arange(len(task))] = 1.0
    # A timestep at which a block does nothing has no CKA; the others of its interval still have theirs.
    known = np.isfinite(cka) & ~np.eye(len(task), dtype=bool)
    pairs = member @ known.astype(float) @ member.T
    sums = member @ np.where(known, cka, 0.0) @ member.T
    mean = np.divide(sums, pairs, out=np.full_like(sums, np.nan), where=pairs > 0)
    return np.where(np.eye(count, dtype=bool) & (member.sum(1) == 1), 1.0, mean)


def _mean_over_blocks(values: FloatArray, axis: int) -> FloatArray:
    """Of the blocks in which a pair is defined; NaN where it is in none."""
    known = np.isfinite(values).sum(axis)
    return np.divide(np.nansum(values, axis=axis), known, out=np.full(known.shape, np.nan), where=known > 0)
