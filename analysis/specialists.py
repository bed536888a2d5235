"""Does sharing pay? Models trained on a single task against one that was trained on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from analysis.frames import mean_loss
from analysis.grouping import group_by_method
from analysis.methods import method_name
from analysis.runs import load_runs
from analysis.uncertainty import mean_interval
from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import KIND_SPECIALIST, RunManifest

_PAIR = ("task", "other_task")
_CURE = "train them with `dtr-lab specialists`"


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
    return _mean_over_seeds(ratio.rename("specialist transfer")).assign_attrs(
        long_name="loss saved against the shared model", directed=True
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
        level: Of the intervals over seeds.

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


def specialist_reach(specialists: Sequence[xr.Dataset]) -> xr.DataArray:
    """-log(L_j(trained on i alone) / L_j(trained on j alone)): how near a specialist of i comes to that of j.

    As `specialist_affinity`, on one scale for all j, which a comparison with other affinities needs.

    Args:
        specialists: Runs trained on a single task each, of one method.

    Returns:
        (task, other_task), 0 on the diagonal, with ``standard_error`` over seeds (NaN for one), attribute ``units``
        their number.

    Raises:
        UserInputError: If no seed has a specialist of every task.
    """
    alone = _stacked(_losses_alone(specialists), None)
    at = xr.DataArray(np.arange(alone.sizes["task"]), dims="other_task")
    own = alone.isel(task=at)
    relative = alone / own.drop_vars(list(own.coords))
    reach = -relative.copy(data=np.log(relative.values))
    return _mean_over_seeds(reach.rename("reach of specialists")).assign_attrs(
        long_name="minus the log loss over the specialist's own", directed=True
    )


def usable_specialists(
    runs: Sequence[xr.Dataset], specialists: Sequence[xr.Dataset]
) -> tuple[dict[str, list[xr.Dataset]], list[str]]:
    """The specialists that can be set against runs, and what is wrong with the others.

    Args:
        runs: Trained on all tasks, of any methods.
        specialists: Trained on a single task each, of any methods.

    Returns:
        Method -> its specialists, of the methods that have a seed with all of them; and a sentence for each other
        method that has any.
    """
    found, problems = {}, []
    for method, own in group_by_method(runs).items():
        alone = [run for run in specialists if run.attrs["method"] == method]
        if not alone:
            continue
        try:
            _paired_losses(own, alone)
        except UserInputError as error:
            problems.append(f"The specialists of {method_name(method)} are left out: {error}.")
        else:
            found[method] = _as_long(own, alone)
    return found, problems


def specialists_of(runs: Sequence[xr.Dataset], tracking_uri: str | None = None) -> list[xr.Dataset]:
    """The finished specialists that belong to the comparisons of these runs; none if none were trained.

    Args:
        runs: Of `runs.load_runs`.
        tracking_uri: The store they were loaded from; see `reading.store.locate_store`.

    Raises:
        UserInputError: If the store cannot be read.
    """
    found: list[xr.Dataset] = []
    for experiment, comparison in dict.fromkeys((run.attrs["experiment"], run.attrs["comparison"]) for run in runs):
        found += load_runs(
            tracking_uri, experiment=experiment, comparison=comparison, kind=KIND_SPECIALIST, missing_ok=True
        )
    return found


Losses = dict[int, dict[int, xr.DataArray]]
"""Final losses (other_task) by seed and task that was trained on."""


def _losses_alone(specialists: Sequence[xr.Dataset]) -> Losses:
    alone: Losses = {}
    for run in specialists:
        task = RunManifest.from_json(run.attrs["manifest"]).trained_task
        if task is not None and "val_loss" in run:
            _keep(alone.setdefault(run.attrs["seed"], {}), task, run)
    return alone


def _keep(found: dict[int, xr.DataArray], key: int, run: xr.Dataset) -> None:
    if key in found:
        raise UserInputError(
            f"several runs stand for one in seed {run.attrs['seed']}, such as {run.attrs.get('name', '')}: choose the "
            "runs of one comparison (`--comparison ID`)"
        )
    found[key] = _final(run)


def _stacked(alone: Losses, seeds: Sequence[int] | None) -> xr.DataArray:
    """(seed, task, other_task) of the seeds named, or of all that have a specialist of every task."""
    tasks = max((each.sizes["other_task"] for own in alone.values() for each in own.values()), default=0)
    chosen = [seed for seed, own in sorted(alone.items()) if len(own) == tasks] if seeds is None else list(seeds)
    if not chosen:
        raise UserInputError(f"no seed has a specialist of each task: {_CURE}")
    single = xr.concat(
        [xr.concat([alone[seed][task] for task in range(tasks)], "task") for seed in chosen],
        pd.Index(chosen, name="seed"),
    )
    names = [name for name in single.coords if single[name].dims == ("other_task",) and name != "other_task"]
    return single.assign_coords({str(name).removeprefix("other_"): ("task", single[name].values) for name in names})


def _mean_over_seeds(values: xr.DataArray) -> xr.DataArray:
    count = values.sizes["seed"]
    error = values.std("seed", ddof=1) / np.sqrt(count) if count > 1 else values.isel(seed=0) * np.nan
    mean = values.mean("seed").transpose(*_PAIR)
    return mean.assign_coords(standard_error=(_PAIR, error.transpose(*_PAIR).values)).assign_attrs(units=count)


def _paired_losses(shared: Sequence[xr.Dataset], specialists: Sequence[xr.Dataset]) -> xr.Dataset:
    """Final losses ``alone`` (seed, task, other_task) of specialists and ``shared`` (seed, other_task)."""
    by_seed: dict[int, xr.DataArray] = {}
    for run in shared:
        if "val_loss" in run and RunManifest.from_json(run.attrs["manifest"]).trained_task is None:
            _keep(by_seed, run.attrs["seed"], run)
    alike = _as_long(shared, specialists)
    alone = _losses_alone(alike)
    tasks = shared[0].sizes["task"] if len(shared) else 0
    seeds = sorted(seed for seed in by_seed if len(alone.get(seed, {})) == tasks)
    if not seeds:
        _check_alike(shared, specialists, list(by_seed))
        have = {seed: sorted(found) for seed, found in alone.items()} or "none"
        raise UserInputError(
            f"no seed has both a shared run (there are {sorted(by_seed) or 'none'}) and a specialist of each of "
            f"{tasks} tasks (there are, by seed: {have}): {_CURE}"
        )
    _check_alike([run for run in shared if run.attrs["seed"] in seeds], alike, seeds)
    together = xr.concat([by_seed[seed] for seed in seeds], pd.Index(seeds, name="seed"))
    return xr.Dataset({"alone": _stacked(alone, seeds), "shared": together})


def _as_long(shared: Sequence[xr.Dataset], specialists: Sequence[xr.Dataset]) -> list[xr.Dataset]:
    """Specialists as long as the shared run of their seed, if it has one; others, of another attempt, say nothing."""
    ends = {run.attrs["seed"]: _end(run) for run in shared if "val_loss" in run}
    return [run for run in specialists if "val_loss" in run and ends.get(run.attrs["seed"], _end(run)) == _end(run)]


def _end(run: xr.Dataset) -> int:
    """Step of the last validation."""
    return int(run["val_step"][-1])


def _check_alike(shared: Sequence[xr.Dataset], specialists: Sequence[xr.Dataset], seeds: Sequence[int]) -> None:
    """Raises UserInputError unless all runs have the same intervals and are equally long."""
    compared = [run for run in (*shared, *specialists) if "val_loss" in run and run.attrs["seed"] in seeds]
    bounds = {tuple(RunManifest.from_json(run.attrs["manifest"]).interval_bounds) for run in compared}
    if len(bounds) > 1:
        raise UserInputError(
            "shared runs and specialists have different timestep intervals: train both with the same `intervals`"
        )
    ends = sorted({_end(run) for run in compared})
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
