"""Gramians of group gradients as labelled arrays: building, choosing the level, pooling runs.

A Gramian has the dimensions (gradient_step, layer, task, half, other_task, other_half): one inner product between the
gradients of two groups' mean losses for every probe and layer, where each task's samples are split into disjoint
halves. Sample counts have the dimensions (gradient_step, task, half). `telemetry.read_telemetry` yields these arrays
for a run, `gramian_arrays` makes them from plain numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import RunManifest, interval_labels

STEP = "gradient_step"
"""Dimension of the probes; its coordinate ``run``, where there is one, says which run each probe belongs to."""

Level = Literal["total", "block", "layer"]
_REST = " (rest)"
_MASKS = "routing"
"""Where the parameters of learned masks are: in no block, and in routed networks alone."""


def gramian_arrays(
    values: npt.NDArray[np.floating],
    counts: npt.NDArray[np.integer],
    *,
    layers: Sequence[str],
    halves: int,
    bounds: Sequence[int],
    losses: npt.NDArray[np.floating] | None = None,
    steps: Sequence[int] | None = None,
    log_snr: Sequence[float] | None = None,
) -> xr.Dataset:
    """Labels plain arrays of Gramians as `telemetry.read_telemetry` does.

    Args:
        values: (S, L, G, G) inner products of S probes in L layers, group ``task * halves + half``. Kept in their own
            precision; statistics add up in float64.
        counts: (S, G) samples of each group.
        layers: L names of layers, as in the state dict.
        halves: Halves of each task, so that there are K = G / halves tasks.
        bounds: K + 1 increasing timesteps; task k holds ``bounds[k] <= t < bounds[k + 1]``, and the last one is T.
        losses: (S, G) mean losses of the groups; only `affinity.tag_affinity` needs them.
        steps: S step numbers; 0 ... S - 1 without them.
        log_snr: (T,) log signal-to-noise ratio of each timestep, for the axes of figures.

    Returns:
        Dataset with ``gramian``, ``group_count`` and, given losses, ``group_loss``, with the interval coordinates of
        `task_coordinates`.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    tasks = len(bounds) - 1
    groups = tasks * halves
    if values.ndim != 4 or values.shape[1:] != (len(layers), groups, groups) or len(values) == 0:
        raise ValueError(
            f"Gramians of shape {values.shape}, but {len(layers)} layers and {tasks} tasks of {halves} halves need "
            f"(probes, {len(layers)}, {groups}, {groups}) with at least one probe"
        )
    for name, array in (("counts", counts), ("losses", losses)):
        if array is not None and array.shape != (len(values), groups):
            raise ValueError(f"{name} of shape {array.shape}, but the Gramians need {(len(values), groups)}")
    split = (tasks, halves)
    group_dims = (STEP, "task", "half")
    variables: dict[str, tuple[tuple[str, ...], npt.NDArray]] = {
        "gramian": (
            (STEP, "layer", "task", "half", "other_task", "other_half"),
            values.reshape(*values.shape[:2], *split, *split),
        ),
        "group_count": (group_dims, counts.reshape(-1, *split)),
    }
    if losses is not None:
        variables["group_loss"] = (group_dims, losses.reshape(-1, *split))
    coords = {STEP: np.arange(len(values)) if steps is None else np.asarray(steps), "layer": list(layers)}
    return xr.Dataset(variables, coords={**coords, **task_coordinates(bounds, log_snr).coords})


def task_coordinates(bounds: Sequence[int], log_snr: Sequence[float] | None = None) -> xr.Dataset:
    """The coordinates of K tasks: ``interval`` (label), ``t_low``, ``t_high`` (inclusive) and ``log_snr`` on ``task``.

    The same with the prefix ``other_`` on ``other_task``. ``log_snr`` (T,), if given, is taken at each interval's
    median timestep.
    """
    edges = np.asarray(bounds)
    named: dict[str, npt.NDArray] = {
        "interval": np.asarray(interval_labels([int(edge) for edge in edges])),
        "t_low": edges[:-1],
        "t_high": edges[1:] - 1,
    }
    if log_snr is not None:
        snr = np.asarray(log_snr, dtype=float)
        # The median, not the mean: a schedule with zero terminal SNR has -inf at its last timestep.
        named["log_snr"] = np.asarray([np.median(snr[low:high]) for low, high in itertools.pairwise(edges)])
    coords: dict[str, tuple[str, npt.NDArray]] = {}
    for prefix in ("", "other_"):
        dim = f"{prefix}task"
        coords[dim] = (dim, np.arange(len(edges) - 1))
        coords |= {f"{prefix}{name}": (dim, values) for name, values in named.items()}
    return xr.Dataset(coords=coords)


def measured_gramian(run: xr.Dataset) -> xr.DataArray:
    """The Gramians of a run as they were measured.

    Raises:
        UserInputError: If it has no gradient probes.
    """
    if "gramian" not in run:
        raise UserInputError(
            f"run {run.attrs.get('name', '')} has no gradient_conflict telemetry: train with "
            "`gradient_conflict.every_n_steps` above 0 and at most the number of training steps, or leave the run out"
        )
    return run["gramian"]


def run_gramian(run: xr.Dataset, level: Level = "total") -> xr.DataArray:
    """The Gramians of a run at a level, its residual blocks by name.

    Raises:
        UserInputError: If it has no gradient probes.
    """
    return sum_layers(measured_gramian(run), level, _residual_blocks(run))


def _residual_blocks(run: xr.Dataset) -> list[str]:
    """Names in the order of the network, which the manifest knows also where no activations were measured."""
    if "block" in run.coords:
        return [str(name) for name in run["block"].values]
    return list(RunManifest.from_json(run.attrs["manifest"]).block_channels) if "manifest" in run.attrs else []


def sum_layers(gramian: xr.DataArray, level: Level, blocks: Sequence[str] = ()) -> xr.DataArray:
    """Adds up the Gramians of layers: a Gramian over more parameters is the sum of those over disjoint parts.

    Args:
        gramian: (gradient_step, layer, task, half, other_task, other_half).
        level: ``"layer"`` leaves it as it is, ``"block"`` yields the dimension ``block`` instead of ``layer``,
            ``"total"`` sums over all layers.
        blocks: Names of the residual blocks, in the order of the network. Learned masks are part of none, and left
            out. Other layers go by the first component of
            their name; where blocks share it, they are its ``(rest)`` and come after these blocks.

    Returns:
        The Gramian; sums are float64. Blocks are in the order of the network: state dicts need not be (the middle block
        of diffusers' U-Nets comes after the upward ones there).
    """
    if level == "layer":
        return gramian
    if level == "total":
        return gramian.sum("layer", dtype=float, skipna=False)
    names = [_block_of(str(layer), blocks) for layer in gramian["layer"].values]
    rows = [row for row in _network_order(names, blocks) if row != _MASKS]
    ordered = gramian.transpose(STEP, "layer", ...)
    members = [[at for at, name in enumerate(names) if name == row] for row in rows]
    sums = np.stack([ordered.values[:, own].sum(1, dtype=float) for own in members], axis=1)
    # The first layer of each block lends it the labels.
    labelled = ordered.isel(layer=[own[0] for own in members]).copy(data=sums)
    return labelled.drop_vars("layer").rename(layer="block").assign_coords(block=rows)


def _block_of(layer: str, blocks: Sequence[str]) -> str:
    inside = next((block for block in blocks if f"{layer}.".startswith(f"{block}.")), None)
    if inside is not None:
        return inside
    head = _head(layer)
    return f"{head}{_REST}" if any(_head(block) == head for block in blocks) else head


def _network_order(names: Sequence[str], blocks: Sequence[str]) -> list[str]:
    """The distinct names, those of one container together: containers with blocks in the order of these blocks."""
    rows = list(dict.fromkeys(names))
    place = {block: at for at, block in enumerate(blocks)}
    heads = list(dict.fromkeys(_head(row) for row in rows))
    with_blocks = iter(head for head in dict.fromkeys(_head(block) for block in blocks) if head in heads)
    known = {_head(block) for block in blocks}
    heads = [next(with_blocks) if head in known else head for head in heads]
    return sorted(rows, key=lambda row: (heads.index(_head(row)), place.get(row, len(place))))


def _head(name: str) -> str:
    return name.removesuffix(_REST).split(".")[0]


def same_parts(runs: Sequence[xr.Dataset], level: Level) -> bool:
    """Whether the Gramians of these runs are of the same blocks or layers, so that one figure can show them."""
    if level == "total":
        return True
    blocks = [_residual_blocks(run) for run in runs]
    layers = [[str(layer) for layer in measured_gramian(run)["layer"].values] for run in runs]
    if level == "block":
        layers = [
            [row for row in _network_order([_block_of(layer, own) for layer in names], own) if row != _MASKS]
            for names, own in zip(layers, blocks, strict=True)
        ]
    return all(names == layers[0] for names in layers)


def pool_runs(runs: Sequence[xr.Dataset], level: Level = "total") -> tuple[xr.DataArray, xr.DataArray]:
    """Gramians and sample counts of all probes of several runs, one after the other along ``gradient_step``.

    Averages over them are averages over the networks of these runs. All runs must measure the same intervals.

    Returns:
        Both with the coordinate ``run`` (gradient_step): the place of the probe's run among ``runs``, by which errors
        can be clustered.

    Raises:
        UserInputError: If a run has no gradient probes, or the runs have different blocks or layers at that level.
    """
    if not same_parts(runs, level):
        raise UserInputError(
            f"the runs have different {level}s, whose Gramians cannot be pooled {level} by {level}: choose runs of one "
            "architecture, or pool them at the level 'total'"
        )
    gramian = join_probes([run_gramian(run, level) for run in runs])
    count = join_probes([run["group_count"] for run in runs])
    of_run = (STEP, np.repeat(np.arange(len(runs)), [run.sizes[STEP] for run in runs]))
    return gramian.assign_coords(run=of_run), count.assign_coords(run=of_run)


def join_probes(parts: Sequence[xr.DataArray]) -> xr.DataArray:
    """Quantities of several runs one after the other along the probes, with the labels of the first."""
    first = parts[0]
    if len(parts) == 1:
        return first
    # Plain arrays: comparing the labels of all would take longer than all else.
    axis = first.get_axis_num(STEP)
    values = np.concatenate([part.transpose(*first.dims).values for part in parts], axis)
    kept = {name: coord for name, coord in first.coords.items() if STEP not in coord.dims}
    steps = np.concatenate([part[STEP].values for part in parts])
    return xr.DataArray(values, {**kept, STEP: steps}, first.dims, first.name, first.attrs)


def with_total(run: xr.Dataset) -> xr.Dataset:
    """The run with one layer, the sum of all: to sum once what many statistics over all parameters need.

    Raises:
        UserInputError: If it has no gradient probes.
    """
    total = run_gramian(run).expand_dims(layer=["all"]).transpose(*run["gramian"].dims)
    return run.drop_vars(["gramian", "layer"], errors="ignore").assign(gramian=total)
