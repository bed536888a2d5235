"""Reading table `records.GRADIENT_GRAMIAN`: a row for each probe and layer -> arrays over probes and layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xarray as xr

from analysis.gramians import STEP, gramian_arrays
from analysis.reading.row_buffer import RowBuffer
from analysis.reading.shards import Shard, codes, distinct, reduce_shards, stack_lists
from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import RunManifest

_COLUMNS = ("layer", "halves", "group_count", "group_loss", "gramian", "coverage")

IntArray = npt.NDArray[np.int64]


def read_gramians(shards: Sequence[Shard], manifest: RunManifest) -> xr.Dataset | None:
    """The Gramians that `telemetry.read_telemetry` describes; None if there are none."""
    num_tasks = len(manifest.interval_bounds) - 1
    rows = _Rows(sum(shard.rows for shard in shards))
    for part in reduce_shards(shards, _COLUMNS, lambda path, table: _part(path, table, num_tasks)):
        rows.add(part)
    if not rows.parts:
        return None
    steps = np.unique(np.concatenate([part.steps for part in rows.parts]))
    groups = num_tasks * rows.parts[0].halves
    count = np.zeros((len(steps), groups), dtype=np.int64)
    loss = np.full((len(steps), groups), np.nan)
    coverage = np.ones(len(steps))
    for part in rows.parts:
        at = np.searchsorted(steps, part.steps)
        count[at], loss[at], coverage[at] = part.count, part.loss, part.coverage
    arrays = gramian_arrays(
        rows.by_layer(steps).reshape(len(steps), -1, groups, groups),
        count,
        layers=list(rows.layers),
        halves=groups // num_tasks,
        bounds=manifest.interval_bounds,
        losses=loss,
        steps=steps.tolist(),
        log_snr=manifest.log_snr,
    )
    return arrays.assign(coverage=(STEP, coverage))


@dataclasses.dataclass
class _Part:
    """What some shards hold.

    Attributes:
        path: Of the first.
        halves: Of each task.
        steps: (S,) distinct steps.
        at: (N,) place of each row's step among them.
        names: Distinct layers.
        layer: (N,) place of each row's layer among them, later among all of the run's.
        gramian: (N, G * G).
        count: (S, G) samples.
        loss: (S, G) mean losses.
        coverage: (S,)
    """

    path: Path
    halves: int
    steps: IntArray
    at: IntArray
    names: list[str]
    layer: IntArray
    gramian: npt.NDArray[np.float32]
    count: npt.NDArray
    loss: npt.NDArray
    coverage: npt.NDArray[np.float64]


def _part(path: Path, table: pa.Table, num_tasks: int) -> _Part:
    halves = table["halves"].unique().to_pylist()
    _same_halves(path, halves)
    groups = num_tasks * halves[0]
    steps, at = distinct(table["step"].to_numpy())
    names = table["layer"].unique().to_pylist()
    one_row = np.zeros(len(steps), dtype=np.int64)
    one_row[at] = np.arange(len(at))
    # Tables from before the column have Gramians that are complete.
    covered = pc.fill_null(table["coverage"], 1.0).to_numpy()
    return _Part(
        path=path,
        halves=halves[0],
        steps=steps,
        at=at,
        names=names,
        layer=codes(table["layer"], names, path),
        gramian=stack_lists(table, "gramian", path, groups**2),
        count=stack_lists(table, "group_count", path, groups)[one_row],
        loss=stack_lists(table, "group_loss", path, groups)[one_row],
        coverage=covered[one_row],
    )


def _same_halves(path: Path, halves: Sequence[int]) -> None:
    if len(set(halves)) > 1:
        raise UserInputError(f"{path.parent}: Gramians with different numbers of halves {sorted(set(halves))}")


class _Rows:
    """The rows of all shards.

    Args:
        most: Rows there may be.
    """

    def __init__(self, most: int) -> None:
        self.parts: list[_Part] = []
        self.layers: dict[str, int] = {}
        self._most = most
        self._gramians = RowBuffer(0, 0)

    def add(self, part: _Part) -> None:
        """Takes over what some shards hold."""
        if not self.parts:
            self._gramians = RowBuffer(self._most, part.gramian.shape[1])
        else:
            _same_halves(part.path, [self.parts[0].halves, part.halves])
        self._gramians.append(part.gramian)
        own = np.array([self.layers.setdefault(name, len(self.layers)) for name in part.names])
        self.parts.append(dataclasses.replace(part, layer=own[part.layer], names=[], gramian=part.gramian[:0].copy()))

    def by_layer(self, steps: IntArray) -> npt.NDArray[np.float32]:
        """The Gramians (S, L, G * G), NaN where a layer was not measured."""
        at = np.concatenate([np.searchsorted(steps, part.steps)[part.at] for part in self.parts])
        place = at * len(self.layers) + np.concatenate([part.layer for part in self.parts])
        shape = (len(steps), len(self.layers))
        return self._gramians.arranged(place, shape[0] * shape[1]).reshape(*shape, -1)
