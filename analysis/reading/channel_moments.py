"""Reading table `records.CHANNEL_ACTIVATION`: by far the largest of a run, as it has a number for every channel.

The statistics of `activations` follow from the mean square alone, so the other moments stay on the disk until somebody
looks at them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from analysis.reading.row_buffer import RowBuffer
from analysis.reading.shards import Shard, codes, distinct, list_entries, reduce_shards
from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import RunManifest

SITES = ("input", "update")
DEFERRED_MOMENTS = ("mean", "active_fraction")

IntArray = npt.NDArray[np.int64]


def read_activations(shards: Sequence[Shard], manifest: RunManifest) -> xr.Dataset | None:
    """The moments of channels that `telemetry.read_telemetry` describes; None if there are none."""
    rows, found = _read("mean_square", shards, manifest)
    if not found:
        return None
    step, block, site, task, samples = (np.concatenate(columns) for columns in zip(*found, strict=True))
    steps, at = distinct(step)
    shape = (len(steps), len(manifest.block_channels), len(SITES), len(manifest.interval_bounds) - 1)
    place = np.ravel_multi_index((at, block, site, task), shape)
    count = np.zeros(shape, dtype=np.int64)
    count.flat[place] = samples
    mean_square = rows.arranged(place, count.size).reshape(*shape, -1)
    dims = ("activation_step", "block", "site", "task", "channel")
    variables: dict[str, Any] = {"activation_count": (dims[:-1], count), "activation_mean_square": (dims, mean_square)}
    for moment in DEFERRED_MOMENTS:
        deferred = _Deferred(moment, shards, manifest, place, mean_square.shape)
        variables[f"activation_{moment}"] = (dims, indexing.LazilyIndexedArray(deferred))
    labels = (steps, list(manifest.block_channels), list(SITES), None, np.arange(mean_square.shape[-1]))
    return xr.Dataset(variables, {dim: values for dim, values in zip(dims, labels, strict=True) if values is not None})


def _read(
    moment: str, shards: Sequence[Shard], manifest: RunManifest
) -> tuple[RowBuffer, list[tuple[npt.NDArray, ...]]]:
    """One moment of all rows that count, and their step, block, site, task and count."""
    channels = np.array(list(manifest.block_channels.values()))
    rows = RowBuffer(sum(shard.rows for shard in shards), int(channels.max()))

    def take(path: Path, table: pa.Table) -> tuple[npt.NDArray, ...]:
        block = codes(table["block"], list(manifest.block_channels), path)
        site = codes(table["site"], SITES, path)
        entries, widths = list_entries(table, moment)
        # What a block of a U-Net adds may have more or fewer channels than what it reads.
        wrong = np.where(site == SITES.index("input"), widths != channels[block], widths > channels.max())
        if wrong.any():
            raise UserInputError(
                f"{path}: column {moment!r} must hold lists of {channels[block][wrong][0]} entries for a block that "
                f"reads as many channels, not {widths[wrong][0]}"
            )
        for first, width, number in _stretches(widths):
            rows.append(entries[first : first + number * width].reshape(number, width))
        return table["step"].to_numpy(), block, site, table["task"].to_numpy(), table["count"].to_numpy()

    return rows, list(reduce_shards(shards, ("block", "site", "task", "count", moment), take))


def _stretches(widths: IntArray) -> Iterator[tuple[int, int, int]]:
    """First entry, width and number of the lists of one width that follow one another."""
    starts = np.flatnonzero(np.r_[True, widths[1:] != widths[:-1]])
    numbers = np.diff(np.r_[starts, len(widths)])
    first = np.r_[0, np.cumsum(widths)][starts]
    yield from zip(first.tolist(), widths[starts].tolist(), numbers.tolist(), strict=True)


class _Deferred(BackendArray):
    """A moment that is read as a whole when a part of it is first needed, and then kept."""

    dtype = np.dtype(np.float32)

    def __init__(
        self, moment: str, shards: Sequence[Shard], manifest: RunManifest, place: IntArray, shape: tuple[int, ...]
    ) -> None:
        self.shape = shape
        self._moment = moment
        self._shards = shards
        self._manifest = manifest
        self._place = place

    @functools.cached_property
    def _values(self) -> npt.NDArray[np.float32]:
        rows, _ = _read(self._moment, self._shards, self._manifest)
        return rows.arranged(self._place, int(np.prod(self.shape[:-1]))).reshape(self.shape)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        support = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, support, lambda place: self._values[place])
