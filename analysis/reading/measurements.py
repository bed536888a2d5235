"""What `dtr-lab affinity` measured at a run's checkpoints, as labelled arrays: transfer between tasks, HSIC.

Every measure has a step dimension of its own, of the checkpoints that were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xarray as xr

from analysis.reading.shards import Shard, codes, stack_lists
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from lightning_modules.tracking.records import RunManifest

SUMS = ("before", "change", "change_sq", "predicted")


def read_transfer(shards: Sequence[Shard], manifest: RunManifest) -> list[xr.Dataset]:
    """Look-aheads and fine-tunings, of each measure that there is.

    Returns:
        For each measure m of ``look_ahead`` and ``fine_tuning`` that there is, the variables ``m_before``,
        ``m_change``, ``m_change_sq`` and ``m_predicted`` of `records.TASK_TRANSFER` (m_step, m_updates, m_repeat, task,
        other_task), ``task`` being the one trained on; ``m_count`` likewise, 0 where nothing was measured; and
        ``m_learning_rate``, ``m_optimizer`` (m_step).
    """
    read = [(shard.path, shard.read()) for shard in shards]
    found = []
    for measure in (records.LOOK_AHEAD, records.FINE_TUNING):
        kept = [(path, table.filter(pc.equal(table["measure"].cast(pa.string()), measure))) for path, table in read]
        tables = [(path, table) for path, table in kept if table.num_rows]
        if tables:
            found.append(_measured(tables, measure, len(manifest.interval_bounds) - 1))
    return found


def _measured(tables: Sequence[tuple[Path, pa.Table]], measure: str, tasks: int) -> xr.Dataset:
    axes = {name: _union([table for _, table in tables], name) for name in ("step", "updates", "repeat")}
    shape = (*(len(values) for values in axes.values()), tasks, tasks)
    sums = {name: np.full(shape, np.nan) for name in SUMS}
    count = np.zeros(shape, dtype=np.int64)
    rate, optimizer = np.full(shape[0], np.nan), np.full(shape[0], "", dtype=object)
    for path, table in tables:
        at = tuple(np.searchsorted(values, table[name].to_numpy()) for name, values in axes.items())
        index = (*at, table["source"].to_numpy())
        count[index] = stack_lists(table, "count", path, tasks)
        for name, values in sums.items():
            values[index] = stack_lists(table, name, path, tasks)
        rate[at[0]] = table["learning_rate"].to_numpy()
        optimizer[at[0]] = table["optimizer"].to_pylist()
    dims = (*(f"{measure}_{name}" for name in axes), "task", "other_task")
    variables: dict[str, tuple[tuple[str, ...], npt.NDArray]] = {
        f"{measure}_{name}": (dims, values) for name, values in (*sums.items(), ("count", count))
    }
    variables[f"{measure}_learning_rate"] = (dims[:1], rate)
    variables[f"{measure}_optimizer"] = (dims[:1], optimizer.astype(str))
    return xr.Dataset(variables, coords=dict(zip(dims, axes.values(), strict=False)))


def read_representation(shards: Sequence[Shard], manifest: RunManifest) -> xr.Dataset | None:
    """HSIC between timesteps, None if there is none.

    Returns:
        ``representation_hsic`` (representation_step, block, representation_batch, probed_timestep,
        other_probed_timestep), NaN where nothing was measured, and ``representation_count`` (representation_step,
        representation_batch): images.
    """
    tables = [(shard.path, table) for shard in shards if (table := shard.read()).num_rows]
    if not tables:
        return None
    blocks = list(manifest.block_channels)
    axes = {name: _union([table for _, table in tables], name) for name in ("step", "batch")}
    timesteps = np.unique(np.concatenate([_timesteps(table) for _, table in tables]))
    shape = (len(axes["step"]), len(blocks), len(axes["batch"]), len(timesteps), len(timesteps))
    hsic = np.full(shape, np.nan)
    count = np.zeros((shape[0], shape[2]), dtype=np.int64)
    for path, table in tables:
        step, batch = (np.searchsorted(values, table[name].to_numpy()) for name, values in axes.items())
        count[step, batch] = table["count"].to_numpy()
        own = _timesteps(table)
        if {tuple(row) for row in table["timesteps"].to_pylist()} != {tuple(own.tolist())}:
            raise UserInputError(f"{path}: rows of different timesteps in one file")
        block = codes(table["block"], blocks, path)
        values = stack_lists(table, "hsic", path, len(own) ** 2).reshape(-1, len(own), len(own))
        at = np.searchsorted(timesteps, own)
        hsic[step[:, None, None], block[:, None, None], batch[:, None, None], at[:, None], at] = values
    dims = ("representation_step", "block", "representation_batch", "probed_timestep", "other_probed_timestep")
    coords = dict(zip(dims, (axes["step"], blocks, axes["batch"], timesteps, timesteps), strict=True))
    return xr.Dataset(
        {"representation_hsic": (dims, hsic), "representation_count": ((dims[0], dims[2]), count)}, coords=coords
    )


def _timesteps(table: pa.Table) -> npt.NDArray[np.int64]:
    return np.asarray(table["timesteps"][0].as_py(), dtype=np.int64)


def _union(tables: Sequence[pa.Table], name: str) -> npt.NDArray[np.int64]:
    return np.unique(np.concatenate([table[name].to_numpy() for table in tables])).astype(np.int64)
