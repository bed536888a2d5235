"""How alike the network's representations are at different timesteps: linear CKA with the unbiased estimator.

What was measured, and how (residual stream behind each block, same images for all timesteps), is told in
`lightning_modules/representation.py`. DTR's figure 6 shows such matrices; it does not say how they were made.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis.gramians import task_coordinates
from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import RunManifest

_BATCH = "representation_batch"
_TIMES = ("probed_timestep", "other_probed_timestep")


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
    return _cka(_hsic(run, step).sum(_BATCH, min_count=1)).rename("CKA").assign_attrs(long_name="CKA")


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
    hsic = _hsic(run, step)
    manifest = RunManifest.from_json(run.attrs["manifest"])
    total = hsic.sum(_BATCH, min_count=1)
    value = _by_task(_cka(total), manifest)
    without = _by_task(_cka(total - hsic.fillna(0.0)), manifest)
    if not by_block:
        value, without = value.mean("block"), without.mean("block")
    batches = hsic.sizes[_BATCH]
    spread = ((without - without.mean(_BATCH)) ** 2).sum(_BATCH, skipna=False)
    error = ((batches - 1) / batches * spread) ** 0.5 if batches > 1 else value * np.nan
    error = error.transpose(*value.dims).drop_vars(list(error.coords))
    return (
        value.rename("representation similarity")
        .assign_coords(standard_error=error)
        .assign_attrs(long_name="CKA", directed=False, units=batches)
    )


def _hsic(run: xr.Dataset, step: int | None) -> xr.DataArray:
    """(block, representation_batch, probed_timestep, other_probed_timestep) of one checkpoint, batches without gaps."""
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
    hsic = run["representation_hsic"].sel(representation_step=known[-1] if step is None else step, drop=True)
    for dim in (_BATCH, *_TIMES):
        hsic = hsic.dropna(dim, how="all")
    snr = run["timestep_log_snr"].sel(timestep=hsic[_TIMES[0]].values).values
    return hsic.drop_vars([name for name in hsic.coords if name not in hsic.dims]).assign_coords(
        log_snr=(_TIMES[0], snr)
    )


def _cka(hsic: xr.DataArray) -> xr.DataArray:
    at = xr.DataArray(np.arange(hsic.sizes[_TIMES[0]]), dims=_TIMES[0])
    own = hsic.isel({_TIMES[1]: at}).drop_vars(_TIMES[1])
    norm = own.where(own > 0) ** 0.5
    other = norm.drop_vars([name for name in norm.coords if name != _TIMES[0] and _TIMES[0] in norm[name].dims])
    return hsic / (norm * other.rename({_TIMES[0]: _TIMES[1]}))


def _by_task(cka: xr.DataArray, manifest: RunManifest) -> xr.DataArray:
    """Mean over the defined pairs of different timesteps of each two intervals: (..., task, other_task)."""
    bounds = manifest.interval_bounds
    task = np.searchsorted(bounds, cka[_TIMES[0]].values, side="right") - 1
    count = len(bounds) - 1
    member = np.zeros((count, len(task)))
    member[task, np.arange(len(task))] = 1.0
    lead = [dim for dim in cka.dims if dim not in _TIMES]
    values = cka.transpose(*lead, *_TIMES).values
    # A timestep at which a block does nothing has no CKA; the others of its interval still have theirs.
    known = np.isfinite(values) & ~np.eye(len(task), dtype=bool)
    pairs = member @ known.astype(float) @ member.T
    sums = member @ np.where(known, values, 0.0) @ member.T
    alone = np.eye(count, dtype=bool) & (member.sum(1) == 1)
    mean = np.divide(sums, pairs, out=np.full_like(sums, np.nan), where=pairs > 0)
    mean = np.where(alone, 1.0, mean)
    coords = {dim: cka[dim] for dim in lead if dim in cka.coords}
    tasks = task_coordinates(bounds, manifest.log_snr).coords
    return xr.DataArray(mean, dims=(*lead, "task", "other_task"), coords=coords).assign_coords(tasks)
