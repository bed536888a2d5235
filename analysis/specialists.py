"""Does sharing pay? Models trained on a single task against one that was trained on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from analysis.frames import mean_loss
from analysis.uncertainty import mean_interval
from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import RunManifest

_PAIR = ("task", "other_task")


def specialist_affinity(shared: Sequence[xr.Dataset], specialists: Sequence[xr.Dataset]) -> xr.DataArray:
    """1 - L_j(trained on i alone) / L_j(trained on all tasks): how well a specialist of i does on every j.

    Its diagonal says whether sharing pays (`negative_transfer_gap`); off the diagonal, how far what was learned on i
    carries to j. Final validation losses, paired by seed, mean over the seeds that have all specialists.

    Args:
        shared: Runs trained on all tasks, of one method.
        specialists: Runs trained on a single task each (``load_runs(..., kind="specialist")``).

    Returns:
        (task, other_task), with ``standard_error`` over seeds (NaN for one), attribute ``units`` their number.

    Raises:
        UserInputError: If no seed has a shared run and a specialist of every task.
    """
    by_seed = _paired_losses(shared, specialists)
    ratio = 1 - by_seed["alone"] / by_seed["shared"]
    count = ratio.sizes["seed"]
    error = ratio.std("seed", ddof=1) / np.sqrt(count) if count > 1 else ratio.isel(seed=0) * np.nan
    value = ratio.mean("seed").transpose(*_PAIR).rename("specialist transfer")
    return value.assign_coords(standard_error=(_PAIR, error.transpose(*_PAIR).values)).assign_attrs(
        long_name="loss saved against the shared model", directed=True, units=count
    )


def negative_transfer_gap(
    shared: Sequence[xr.Dataset], specialists: Sequence[xr.Dataset], level: float = 0.95
) -> xr.Dataset:
    """L_k(trained on k alone) / L_k(trained on all tasks) - 1: below zero, the other tasks did task k harm.

    Source: ANT (Go et al., arXiv 2306.00354) defines the gap by the FID of images whose interval a model denoises; here
    it is the loss of the interval, which needs no samples. What the comparison means depends on what the specialists
    were given, see `dtr-lab specialists`.

    Args:
        shared: Runs trained on all tasks, of one method.
        specialists: Runs trained on a single task each.
        level: Of the t-intervals over seeds.

    Returns:
        ``gap``, ``low`` and ``high`` (task), and ``by_seed`` (seed, task).

    Raises:
        UserInputError: If no seed has a shared run and a specialist of every task.
    """
    by_seed = _paired_losses(shared, specialists)
    at = xr.DataArray(np.arange(by_seed.sizes["task"]), dims="task")
    gap = (by_seed["alone"] / by_seed["shared"] - 1).isel(other_task=at)
    gap = gap.drop_vars([name for name in gap.coords if str(name).startswith("other_")]).transpose("seed", "task")
    intervals = [mean_interval(gap.isel(task=task).values, level) for task in at.values]
    found = {name: ("task", [getattr(each, name) for each in intervals]) for name in ("estimate", "low", "high")}
    return xr.Dataset({"by_seed": gap, "gap": found["estimate"], "low": found["low"], "high": found["high"]})


def _paired_losses(shared: Sequence[xr.Dataset], specialists: Sequence[xr.Dataset]) -> xr.Dataset:
    """Final losses ``alone`` (seed, task, other_task) of specialists and ``shared`` (seed, other_task)."""
    by_seed = {run.attrs["seed"]: _final(run) for run in shared if "val_loss" in run}
    alone: dict[int, dict[int, xr.DataArray]] = {}
    for run in specialists:
        task = RunManifest.from_json(run.attrs["manifest"]).trained_task
        if task is not None and "val_loss" in run:
            alone.setdefault(run.attrs["seed"], {})[task] = _final(run)
    tasks = shared[0].sizes["task"] if len(shared) else 0
    seeds = sorted(seed for seed in by_seed if len(alone.get(seed, {})) == tasks)
    if not seeds:
        have = {seed: sorted(found) for seed, found in alone.items()} or "none"
        raise UserInputError(
            f"no seed has both a shared run (there are {sorted(by_seed) or 'none'}) and a specialist of each of "
            f"{tasks} tasks (there are, by seed: {have}): train them with `dtr-lab specialists`"
        )
    _check_equally_long(shared, specialists, seeds)
    together = xr.concat([by_seed[seed] for seed in seeds], pd.Index(seeds, name="seed"))
    single = xr.concat(
        [xr.concat([alone[seed][task] for task in range(tasks)], "task") for seed in seeds], together["seed"]
    )
    own = {name: coord for name, coord in shared[0].coords.items() if coord.dims == ("task",)}
    return xr.Dataset({"alone": single, "shared": together}).assign_coords(own)


def _check_equally_long(shared: Sequence[xr.Dataset], specialists: Sequence[xr.Dataset], seeds: Sequence[int]) -> None:
    compared = [run for run in (*shared, *specialists) if "val_loss" in run and run.attrs["seed"] in seeds]
    ends = sorted({int(run["val_step"][-1]) for run in compared})
    if len(ends) > 1:
        raise UserInputError(
            f"shared runs and specialists end at different steps {ends}, so their losses say nothing about sharing: "
            "train both equally long (`dtr-lab specialists --set trainer.max_steps=N`)"
        )


def _final(run: xr.Dataset) -> xr.DataArray:
    """Last validation loss (other_task), with the interval coordinates of that dimension."""
    loss = mean_loss(run["val_loss"]).isel(val_step=-1, drop=True)
    plain = loss.drop_vars([name for name in loss.coords if "task" in loss[name].dims]).rename(task="other_task")
    return plain.assign_coords({name: coord for name, coord in run.coords.items() if coord.dims == ("other_task",)})
