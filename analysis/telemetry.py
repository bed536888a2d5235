"""One run's telemetry folder (Parquet shards, manifest, masks) -> one `xarray.Dataset`, reduced while reading.

A long run writes millions of per-timestep rows. They are summed into moments per task, per part of a task in a
quarter of T, and per timestep as each shard is read, so memory follows the result and not the length of the run.
Gramians and activation moments are already small and are kept per step.

The probes run on schedules of their own, so each has its own step dimension (``train_step``, ``val_step``,
``gradient_step``, ``activation_step``): no padding, and no missing value that is not a real gap.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xarray as xr

from analysis.gramians import STEP, gramian_arrays, task_coordinates
from analysis.measurements import read_representation, read_transfer
from analysis.shards import Shard, codes, list_shards, read_manifest, stack_lists
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from lightning_modules.tracking.records import RunManifest

SPLITS = ("train", "val")
QUANTITIES = ("mse", "vb")
MOMENTS = ("count", "sum", "sum_sq")
SITES = ("input", "update")
QUARTERS = 4
ACTIVATION_MOMENTS = ("mean", "mean_square", "active_fraction")

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


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
          channels than the widest are filled with NaN.
        - ``mask`` (block, timestep, channel) of a routed run.
        - ``training_seconds`` (clock_step): time in training steps since step 0.
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
        *_read_losses(shards[records.TIMESTEP_LOSS], manifest),
        _read_gramians(shards[records.GRADIENT_GRAMIAN], manifest),
        _read_activations(shards[records.CHANNEL_ACTIVATION], manifest),
        _read_masks(folder / Path(records.MASKS_PATH).name, manifest),
        _read_training_time(shards[records.TRAINING_TIME]),
        read_transfer(shards[records.TASK_TRANSFER], manifest),
        read_representation(shards[records.REPRESENTATION], manifest),
    ]
    run = xr.merge([part for part in parts if part is not None], join="exact", compat="no_conflicts")
    run.attrs["manifest"] = manifest.to_json()
    return run


def _task_coordinates(manifest: RunManifest) -> xr.Dataset:
    log_snr = np.asarray(manifest.log_snr, dtype=float)
    tasks = task_coordinates(manifest.interval_bounds, manifest.log_snr)
    return tasks.assign_coords(timestep=np.arange(len(log_snr)), timestep_log_snr=("timestep", log_snr))


class _LossSums:
    """Moments of one split's losses per (quantity, step, bin), summed over shards.

    Args:
        bin_of: (T,) bin of each timestep.
        num_bins: Number of bins; some may have no timestep.
    """

    def __init__(self, bin_of: IntArray, num_bins: int) -> None:
        self.bin_of = bin_of
        self.num_bins = num_bins
        self.pieces: list[tuple[IntArray, FloatArray]] = []

    def add(self, rows: dict[str, npt.NDArray]) -> None:
        steps, step_index = np.unique(rows["step"], return_inverse=True)
        shape = (len(QUANTITIES), len(steps), self.num_bins)
        key = np.ravel_multi_index((rows["quantity"], step_index, self.bin_of[rows["timestep"]]), shape)
        size = int(np.prod(shape))
        sums = [np.bincount(key, rows[moment], size).reshape(shape) for moment in MOMENTS]
        self.pieces.append((steps, np.stack(sums)))

    def total(self) -> tuple[IntArray, FloatArray]:
        """Steps (S,) and moments (3, quantity, S, bin)."""
        steps = np.unique(np.concatenate([steps for steps, _ in self.pieces]))
        total = np.zeros((len(MOMENTS), len(QUANTITIES), len(steps), self.num_bins))
        for piece_steps, sums in self.pieces:
            total[:, :, np.searchsorted(steps, piece_steps)] += sums
        return steps, total


def _read_losses(shards: Sequence[Shard], manifest: RunManifest) -> list[xr.Dataset]:
    timesteps = np.arange(manifest.num_timesteps)
    num_tasks = len(manifest.interval_bounds) - 1
    task = np.searchsorted(manifest.interval_bounds, timesteps, side="right") - 1
    quarter = timesteps * QUARTERS // manifest.num_timesteps
    bins = {
        "task": (task, num_tasks),
        "quarter": (task * QUARTERS + quarter, num_tasks * QUARTERS),
        "timestep": (timesteps, manifest.num_timesteps),
    }
    sums = {split: {dim: _LossSums(*binning) for dim, binning in bins.items()} for split in SPLITS}
    for shard in shards:
        table = shard.read()
        columns = {name: table[name].to_numpy() for name in ("step", "timestep", *MOMENTS)}
        columns["quantity"] = codes(table["quantity"], QUANTITIES, shard.path)
        split_code = codes(table["split"], SPLITS, shard.path)
        for code, split in enumerate(SPLITS):
            rows = {name: values[split_code == code] for name, values in columns.items()}
            if not rows["step"].size:
                continue
            sums[split]["task"].add(rows)
            sums[split]["quarter"].add(rows)
            if split == "val":
                rows = {name: values[rows["step"] == rows["step"].max()] for name, values in rows.items()}
            else:
                rows["step"] = np.zeros_like(rows["step"])  # pools all steps
            sums[split]["timestep"].add(rows)
    return [_loss_dataset(split, by_dim) for split, by_dim in sums.items() if by_dim["task"].pieces]


def _loss_dataset(split: str, sums: dict[str, _LossSums]) -> xr.Dataset:
    steps, by_task = sums["task"].total()
    _, by_quarter = sums["quarter"].total()
    _, by_timestep = sums["timestep"].total()
    lead = ("moment", "quantity")
    split_task = (by_task.shape[-1], QUARTERS)
    shared = np.bincount(sums["quarter"].bin_of, minlength=sums["quarter"].num_bins)
    return xr.Dataset(
        {
            f"{split}_loss": ((*lead, f"{split}_step", "task"), by_task),
            f"{split}_quarter_loss": (
                (*lead, f"{split}_step", "task", "quarter"),
                by_quarter.reshape(*by_quarter.shape[:-1], *split_task),
            ),
            f"{split}_timestep_loss": ((*lead, "timestep"), by_timestep[:, :, -1]),
            "quarter_timesteps": (("task", "quarter"), shared.reshape(split_task)),
        },
        coords={
            "moment": list(MOMENTS),
            "quantity": list(QUANTITIES),
            f"{split}_step": steps,
            "quarter": np.arange(QUARTERS),
        },
    )


def _read_gramians(shards: Sequence[Shard], manifest: RunManifest) -> xr.Dataset | None:
    tables = [(shard.path, table) for shard in shards if (table := shard.read()).num_rows]
    if not tables:
        return None
    num_tasks = len(manifest.interval_bounds) - 1
    halves = {half for _, table in tables for half in table["halves"].unique().to_pylist()}
    if len(halves) != 1:
        raise UserInputError(f"{tables[0][0].parent}: Gramians with different numbers of halves {sorted(halves)}")
    groups = num_tasks * halves.pop()
    steps = np.unique(np.concatenate([table["step"].to_numpy() for _, table in tables]))
    layers = list(dict.fromkeys(name for _, table in tables for name in table["layer"].unique().to_pylist()))
    gramian = np.full((len(steps), len(layers), groups, groups), np.nan, dtype=np.float32)
    count = np.zeros((len(steps), groups), dtype=np.int64)
    loss = np.full((len(steps), groups), np.nan)
    coverage = np.ones(len(steps))  # of tables from before the column: their Gramians were complete
    for path, table in tables:
        at = np.searchsorted(steps, table["step"].to_numpy())
        layer = codes(table["layer"], layers, path)
        gramian[at, layer] = stack_lists(table, "gramian", path, groups**2).reshape(-1, groups, groups)
        count[at] = stack_lists(table, "group_count", path, groups)
        loss[at] = stack_lists(table, "group_loss", path, groups)
        if "coverage" in table.column_names:
            coverage[at] = table["coverage"].to_numpy()
    arrays = gramian_arrays(
        gramian,
        count,
        layers=layers,
        halves=groups // num_tasks,
        bounds=manifest.interval_bounds,
        losses=loss,
        steps=steps.tolist(),
        log_snr=manifest.log_snr,
    )
    return arrays.assign(coverage=(STEP, coverage))


def _read_activations(shards: Sequence[Shard], manifest: RunManifest) -> xr.Dataset | None:
    tables = [(shard.path, table) for shard in shards if (table := shard.read()).num_rows]
    if not tables:
        return None
    blocks = list(manifest.block_channels)
    steps = np.unique(np.concatenate([table["step"].to_numpy() for _, table in tables]))
    shape = (len(steps), len(blocks), len(SITES), len(manifest.interval_bounds) - 1)
    widest = max(manifest.block_channels.values())
    moments = {name: np.full((*shape, widest), np.nan, dtype=np.float32) for name in ACTIVATION_MOMENTS}
    count = np.zeros(shape, dtype=np.int64)
    for path, table in tables:
        block_code = codes(table["block"], blocks, path)
        site_code = codes(table["site"], SITES, path)
        for code, site in itertools.product(range(len(blocks)), range(len(SITES))):
            rows = table.filter(pa.array((block_code == code) & (site_code == site)))
            if not rows.num_rows:
                continue
            at = np.searchsorted(steps, rows["step"].to_numpy())
            index = (at, code, site, rows["task"].to_numpy())
            count[index] = rows["count"].to_numpy()
            channels = manifest.block_channels[blocks[code]]
            if SITES[site] != "input":  # a block of a U-Net may add more or fewer channels than it reads
                channels = len(rows["mean"][0])
            for name, values in moments.items():
                values[(*index, slice(channels))] = stack_lists(rows, name, path, channels)
    dims = ("activation_step", "block", "site", "task")
    variables = {f"activation_{name}": ((*dims, "channel"), values) for name, values in moments.items()}
    coords = {"activation_step": steps, "block": blocks, "site": list(SITES), "channel": np.arange(widest)}
    return xr.Dataset({**variables, "activation_count": (dims, count)}, coords=coords)


def _read_training_time(shards: Sequence[Shard]) -> xr.Dataset | None:
    tables = [table for shard in shards if (table := shard.read()).num_rows]
    if not tables:
        return None
    steps, seconds = (np.concatenate([table[name].to_numpy() for table in tables]) for name in ("step", "seconds"))
    order = np.argsort(steps, kind="stable")
    return xr.Dataset({"training_seconds": ("clock_step", seconds[order])}, coords={"clock_step": steps[order]})


def _read_masks(path: Path, manifest: RunManifest) -> xr.Dataset | None:
    if not path.is_file():
        return None
    blocks = list(manifest.block_channels)
    mask = np.zeros((len(blocks), manifest.num_timesteps, max(manifest.block_channels.values())), dtype=bool)
    with np.load(path) as stored:
        for index, block in enumerate(blocks):
            if block not in stored:
                raise UserInputError(f"{path} has no mask for block {block!r}, only {sorted(stored)}")
            mask[index, :, : manifest.block_channels[block]] = stored[block]
    coords = {"block": blocks, "channel": np.arange(mask.shape[-1])}
    return xr.Dataset({"mask": (("block", "timestep", "channel"), mask)}, coords=coords)
