"""One run's telemetry folder (Parquet shards, manifest, masks) -> one `xarray.Dataset`, reduced while reading.

Losses are summed up, and all else is put in its place, as each shard is read, so that memory follows the result and not
the length of the run: `loss_moments`, `gramian_rows`, `channel_moments` and `measurements` each read their tables.

The probes run on schedules of their own, so each has its own step dimension (``train_step``, ``val_step``,
``gradient_step``, ``activation_step``): no padding, and no missing value that is not a real gap.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xarray as xr

from analysis.gramians import task_coordinates
from analysis.reading.channel_moments import read_activations
from analysis.reading.gramian_rows import read_gramians
from analysis.reading.loss_moments import read_losses
from analysis.reading.measurements import read_representation, read_transfer
from analysis.reading.shards import Shard, list_shards, read_manifest, reduce_shards
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from lightning_modules.tracking.records import RunManifest


def read_telemetry(folder: Path) -> xr.Dataset:
    """Reads what one run measured.

    Args:
        folder: The run's local ``telemetry`` folder, holding ``manifest.json``.

    Returns:
        A dataset with the variables that the run has data for:

        - ``train_loss``, ``val_loss`` (moment, quantity, train_step | val_step, task) and ``train_quarter_loss``,
          ``val_quarter_loss`` (..., task, quarter): count, sum and sum of squares of the unweighted per-sample loss.
          Timesteps are sampled stratified by task, so a mean over uniform t weighs tasks by their timesteps.
        - ``quarter_timesteps`` (task, quarter): timesteps that a task shares with a quarter of T.
        - ``train_timestep_loss`` (moment, quantity, timestep), pooled over all steps; ``val_timestep_loss``, of the
          last validation.
        - ``gramian`` (gradient_step, layer, task, half, other_task, other_half), ``group_count`` and ``group_loss``
          (gradient_step, task, half), and ``coverage`` (gradient_step): share of parameters they are exact for.
        - ``activation_mean``, ``activation_mean_square``, ``activation_active_fraction``
          (activation_step, block, site, task, channel) and ``activation_count`` (without channel). Blocks with fewer
          channels than the widest are filled with NaN. The first and the third stay on disk until they are looked at.
        - ``mask`` (block, timestep, channel) of a routed run.
        - ``training_seconds`` (clock_step): time in training steps since step 0.
        - ``task_weight`` (weight_step, task): weights that a multi-task method gave the tasks, 1 for plain training;
          means over the steps since the row before, or since step 0.
        - what `dtr-lab affinity` measured: see `measurements`.

        Coordinates: ``interval`` (label), ``t_low``, ``t_high`` (inclusive) and ``log_snr`` (at the interval's median
        timestep) on ``task``, the same with the prefix ``other_`` on ``other_task``, and ``timestep_log_snr``.
        The attribute ``manifest`` holds the manifest as JSON.

    Raises:
        UserInputError: If the manifest is missing or was written by another schema version, or a shard is damaged.
    """
    manifest = read_manifest(folder)
    shards = list_shards(folder)
    parts = [
        _task_coordinates(manifest),
        *read_losses(shards[records.TIMESTEP_LOSS], manifest),
        read_gramians(shards[records.GRADIENT_GRAMIAN], manifest),
        read_activations(shards[records.CHANNEL_ACTIVATION], manifest),
        _read_masks(folder / Path(records.MASKS_PATH).name, manifest),
        _read_training_time(shards[records.TRAINING_TIME]),
        _read_task_weights(shards[records.TASK_WEIGHT], manifest),
        *read_transfer(shards[records.TASK_TRANSFER], manifest),
        read_representation(shards[records.REPRESENTATION], manifest),
    ]
    run = _together([part for part in parts if part is not None])
    run.attrs["manifest"] = (folder / Path(records.MANIFEST_PATH).name).read_text()
    return run


def _together(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """`xr.merge` of parts that agree in what they share, at a third of its cost.

    Raises:
        ValueError: If they do not.
    """
    variables: dict[Hashable, xr.Variable] = {}
    indexes: dict[Hashable, xr.Index] = {}
    for part in parts:
        for name, variable in part.variables.items():
            known = variables.setdefault(name, variable)
            if known is not variable and not known.equals(variable):
                raise ValueError(f"parts of a run's telemetry differ in {name!r}")
        indexes |= dict(part.xindexes)
    coords = {name for part in parts for name in part.coords}
    labels = xr.Coordinates({name: variables[name] for name in coords}, indexes=indexes)
    return xr.Dataset({name: each for name, each in variables.items() if name not in coords}, labels)


def _task_coordinates(manifest: RunManifest) -> xr.Dataset:
    log_snr = np.asarray(manifest.log_snr, dtype=float)
    tasks = task_coordinates(manifest.interval_bounds, manifest.log_snr)
    return tasks.assign_coords(timestep=np.arange(len(log_snr)), timestep_log_snr=("timestep", log_snr))


def _read_training_time(shards: Sequence[Shard]) -> xr.Dataset | None:
    found = list(reduce_shards(shards, ("seconds",), lambda _, table: (table["step"], table["seconds"])))
    if not found:
        return None
    steps, seconds = (np.concatenate([column.to_numpy() for column in columns]) for columns in zip(*found, strict=True))
    order = np.argsort(steps, kind="stable")
    return xr.Dataset({"training_seconds": ("clock_step", seconds[order])}, coords={"clock_step": steps[order]})


def _read_task_weights(shards: Sequence[Shard], manifest: RunManifest) -> xr.Dataset | None:
    found = list(reduce_shards(shards, ("weight",), lambda _, table: (table["step"], table["weight"])))
    if not found:
        return None
    steps = np.concatenate([column.to_numpy() for column, _ in found])
    rows = [row for _, column in found for row in column.to_numpy()]
    tasks = len(manifest.interval_bounds) - 1
    if any(len(row) != tasks for row in rows):
        raise UserInputError(f"the run has {tasks} tasks, but its task weights are of another number: it is damaged")
    weights = np.stack(rows)
    order = np.argsort(steps, kind="stable")
    return xr.Dataset({"task_weight": (("weight_step", "task"), weights[order])}, {"weight_step": steps[order]})


def _read_masks(path: Path, manifest: RunManifest) -> xr.Dataset | None:
    if not path.is_file():
        return None
    blocks = list(manifest.block_channels)
    mask = np.zeros((len(blocks), manifest.num_timesteps, max(manifest.block_channels.values())), dtype=bool)
    with np.load(path) as stored:
        read: dict[tuple[int, int, int], npt.NDArray[np.bool_]] = {}
        for index, block in enumerate(blocks):
            if block not in stored:
                raise UserInputError(f"{path} has no mask for block {block!r}, only {sorted(stored)}")
            # Most blocks have the same mask: what has the same checksum is unpacked once.
            entry = stored.zip.getinfo(f"{block}.npy")
            key = (entry.CRC, entry.file_size, entry.compress_size)
            if key not in read:
                read[key] = stored[block]
            mask[index, :, : manifest.block_channels[block]] = read[key]
    coords = {"block": blocks, "channel": np.arange(mask.shape[-1])}
    return xr.Dataset({"mask": (("block", "timestep", "channel"), mask)}, coords=coords)
