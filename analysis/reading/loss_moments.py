"""Reading table `records.TIMESTEP_LOSS`: rows of single timesteps are summed up while shards are read.

A long run writes millions of them, so memory must follow the result, not the length of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xarray as xr

from analysis.reading.shards import Shard, codes, distinct, reduce_shards
from lightning_modules.tracking.records import RunManifest

SPLITS = ("train", "val")
QUANTITIES = ("mse", "vb")
MOMENTS = ("count", "sum", "sum_sq")
QUARTERS = 4

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def read_losses(shards: Sequence[Shard], manifest: RunManifest) -> list[xr.Dataset]:
    """The moments of the losses of each split that was measured; `telemetry.read_telemetry` describes them."""
    bins = _Bins(manifest)
    columns = ("step", "split", "quantity", "timestep", *MOMENTS)
    totals = {split: _Total(split) for split in SPLITS}
    for found in reduce_shards(shards, columns, bins.reduce):
        for split, piece in found.items():
            totals[split].add(piece)
    return [total.dataset(bins) for total in totals.values() if total.pieces]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What some rows hold of a split.

    Attributes:
        steps: (S,) increasing.
        by_quarter: (3, Q, S, K, 4) moments of the losses of each task in each quarter of T.
        by_timestep: (3, Q, T) moments of each timestep: in training over all steps, in validation of the last one.
    """

    steps: IntArray
    by_quarter: FloatArray
    by_timestep: FloatArray


class _Bins:
    """Where the loss of a timestep goes: the parts of tasks in the quarters of T."""

    def __init__(self, manifest: RunManifest) -> None:
        self.num_timesteps = manifest.num_timesteps
        self.num_tasks = len(manifest.interval_bounds) - 1
        timesteps = np.arange(self.num_timesteps)
        task = np.searchsorted(manifest.interval_bounds, timesteps, side="right") - 1
        self.of_timestep = task * QUARTERS + timesteps * QUARTERS // self.num_timesteps

    def reduce(self, path: Path, table: pa.Table) -> dict[str, _Piece]:
        """The pieces of some rows by split."""
        steps, at = distinct(table["step"].to_numpy())
        timestep = table["timestep"].to_numpy()
        split = codes(table["split"], SPLITS, path)
        place = split * len(QUANTITIES) + codes(table["quantity"], QUANTITIES, path)
        moments = [table[name].to_numpy() for name in MOMENTS]
        places = len(SPLITS) * len(QUANTITIES)
        present = np.bincount(split * len(steps) + at, minlength=len(SPLITS) * len(steps)).reshape(len(SPLITS), -1) > 0
        by_quarter = _run_sums(
            (place, at, self.of_timestep[timestep]), (places, len(steps), self.num_tasks * QUARTERS), moments
        ).reshape(len(MOMENTS), len(SPLITS), len(QUANTITIES), len(steps), self.num_tasks, QUARTERS)
        if present[1].any():  # validations but the last one go to a place that is dropped
            place = np.where((split == 1) & (at < np.flatnonzero(present[1])[-1]), places, place)
        by_timestep = _sums((place, timestep), (places + 1, self.num_timesteps), moments)[:, :places]
        by_timestep = by_timestep.reshape(len(MOMENTS), len(SPLITS), len(QUANTITIES), self.num_timesteps)
        return {
            name: _Piece(steps[present[s]], by_quarter[:, s][:, :, present[s]], by_timestep[:, s])
            for s, name in enumerate(SPLITS)
            if present[s].any()
        }


def _sums(index: tuple[npt.NDArray, ...], shape: tuple[int, ...], moments: Sequence[npt.NDArray]) -> FloatArray:
    """Sums of each of the moments (N,) over the places that an index gives them: (3, *shape)."""
    flat = np.ravel_multi_index(index, shape)
    size = int(np.prod(shape))
    sums = np.empty((len(moments), size))
    for own, values in zip(sums, moments, strict=True):
        own[:] = np.bincount(flat, values, size)
    return sums.reshape(-1, *shape)


def _run_sums(index: tuple[npt.NDArray, ...], shape: tuple[int, ...], moments: Sequence[npt.NDArray]) -> FloatArray:
    """The same, quicker where many rows in a row have the same place."""
    changes = np.zeros(len(index[0]), dtype=bool)
    changes[0] = True
    for axis in index:
        changes[1:] |= axis[1:] != axis[:-1]
    starts = np.flatnonzero(changes)
    runs = [np.add.reduceat(values, starts, dtype=float) for values in moments]
    return _sums(tuple(axis[starts] for axis in index), shape, runs)


class _Total:
    """The pieces of one split put together."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.pieces: list[tuple[IntArray, FloatArray]] = []
        self.by_timestep = np.zeros(())
        self.newest = -1

    def add(self, piece: _Piece) -> None:
        self.pieces.append((piece.steps, piece.by_quarter))
        newest = int(piece.steps[-1])
        if self.split == "train" or newest == self.newest:
            self.by_timestep = self.by_timestep + piece.by_timestep
        elif newest > self.newest:
            self.by_timestep = piece.by_timestep
        self.newest = max(newest, self.newest)

    def dataset(self, bins: _Bins) -> xr.Dataset:
        steps = np.unique(np.concatenate([steps for steps, _ in self.pieces]))
        by_quarter = np.zeros((len(MOMENTS), len(QUANTITIES), len(steps), bins.num_tasks, QUARTERS))
        for own, sums in self.pieces:
            by_quarter[:, :, np.searchsorted(steps, own)] += sums
        shared = np.bincount(bins.of_timestep, minlength=bins.num_tasks * QUARTERS).reshape(-1, QUARTERS)
        lead = ("moment", "quantity")
        variables = {
            f"{self.split}_loss": ((*lead, f"{self.split}_step", "task"), by_quarter.sum(-1)),
            f"{self.split}_quarter_loss": ((*lead, f"{self.split}_step", "task", "quarter"), by_quarter),
            f"{self.split}_timestep_loss": ((*lead, "timestep"), self.by_timestep),
            "quarter_timesteps": (("task", "quarter"), shared),
        }
        coords = {"moment": list(MOMENTS), "quantity": list(QUANTITIES), "quarter": np.arange(QUARTERS)}
        return xr.Dataset(variables, coords={**coords, f"{self.split}_step": steps})
