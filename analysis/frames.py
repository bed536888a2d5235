"""Runs -> tidy frames: one row per value of a curve, one row per run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from analysis.activations import effective_channels, run_energy
from analysis.axes import CURVE_COLUMNS, add_axes
from analysis.gramians import run_gramian
from analysis.jackknife import quotable_error
from analysis.significance import probe_rate, rates_by_step
from lightning_modules.tracking.records import RunManifest

VAL_LOSS = "loss/val"
LOW_NOISE = "loss/val_low_noise"
HIGH_NOISE = "loss/val_high_noise"
TRAIN_LOSS = "loss/train_mse"
CONFLICT_RATE = "conflict/rate"
EFFECTIVE_CHANNELS = "activation/effective_channels"


def mean_loss(moments: xr.DataArray, quantity: str = "mse") -> xr.DataArray:
    """Mean of the losses behind moments (moment, quantity, ...); NaN where nothing was measured."""
    chosen = moments.sel(quantity=quantity, drop=True).transpose("moment", ...)
    count, total = (chosen.sel(moment=name, drop=True) for name in ("count", "sum"))
    # Plain arrays: comparing their labels would take most of the time, for a hundred runs.
    mean = np.full(total.shape, np.nan)
    np.divide(total.values, count.values, out=mean, where=count.values > 0)
    return total.copy(data=mean)


def uniform_loss(run: xr.Dataset, split: str) -> xr.DataArray:
    """Mean loss over uniform t, Σ_k width_k · mean_k / T over the tasks k, as MLflow's ``loss/val``.

    Timesteps are sampled stratified by task, so the plain mean over samples would weigh narrow tasks too much.

    Args:
        run: A run with losses.
        split: ``"train"`` or ``"val"``.

    Returns:
        (train_step | val_step); NaN where a task was not measured or diverged.
    """
    return _weighted(mean_loss(run[f"{split}_loss"]), (run["t_high"] - run["t_low"] + 1).values)


def quarter_losses(run: xr.Dataset) -> xr.DataArray:
    """Mean validation loss over uniform t of each quarter of T: a task weighs by the timesteps it shares with it.

    Returns:
        (val_step, quarter). A task's share of a quarter that no sample fell into (few timesteps) is left out; NaN where
        nothing of a quarter was measured, or some of it diverged.
    """
    moments = run["val_quarter_loss"]
    measured = moments.sel(quantity="mse", moment="count", drop=True).transpose(..., "task", "quarter") > 0
    weights = np.where(measured, run["quarter_timesteps"].transpose("task", "quarter"), 0)
    return _weighted(mean_loss(moments).transpose(..., "task", "quarter"), weights)


def _weighted(mean: xr.DataArray, timesteps: np.ndarray) -> xr.DataArray:
    """Mean over tasks by their timesteps. NaN is not skipped: a diverged task's loss is not that of the others.

    Args:
        mean: (..., task) or (..., task, quarter).
        timesteps: That many, as an array that can be broadcast to it.
    """
    task = mean.get_axis_num("task")
    total = np.where(timesteps > 0, mean.values * timesteps, 0.0).sum(task)
    weight = np.broadcast_to(timesteps, mean.shape).sum(task)
    average = np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)
    return mean.isel(task=0).drop_vars(["interval", "t_low", "t_high", "log_snr"], errors="ignore").copy(data=average)


def curves_frame(runs: Sequence[xr.Dataset]) -> pd.DataFrame:
    """All curves of all runs.

    Metrics, each where the run has data for it:

    - ``loss/val``: mean unweighted loss over uniform t, on the fixed validation set; ``loss/val_<interval>`` per task;
      ``loss/val_low_noise`` and ``loss/val_high_noise``: over the first and the last quarter of T.
    - ``loss/train_mse``: mean unweighted training loss over uniform t, in the window that ends at the step. (The MLflow
      metric ``loss/train`` is the weighted loss that is optimised.)
    - ``conflict/rate``: share of task pairs with negative gradient cosine, over all parameters.
    - ``activation/effective_channels``: of what blocks read, averaged over blocks and tasks.

    Returns:
        Columns run (id), method, seed, step, samples, seconds, flops, metric, value; see `axes.add_axes`.
    """
    found = [(run.attrs, metric, curve) for run in runs for metric, curve in run_curves(run).items()]
    if not found:
        return pd.DataFrame(columns=CURVE_COLUMNS)
    # One frame from long columns: one for each curve would take most of the time.
    lengths = [curve.size for _, _, curve in found]
    table = {key: np.repeat([attrs[name] for attrs, _, _ in found], lengths) for key, name in _KEYS.items()}
    table["metric"] = np.repeat([metric for _, metric, _ in found], lengths)
    table["step"] = np.concatenate([curve[curve.dims[0]].values for _, _, curve in found])
    table["value"] = np.concatenate([curve.values for _, _, curve in found])
    return add_axes(pd.DataFrame(table), runs)


_KEYS = {"run": "run_id", "method": "method", "seed": "seed"}


def run_curves(run: xr.Dataset) -> dict[str, xr.DataArray]:
    """The curves of one run by metric, each over its own step dimension; see `curves_frame`."""
    curves: dict[str, xr.DataArray] = {}
    if "val_loss" in run:
        curves[VAL_LOSS] = uniform_loss(run, "val")
        by_quarter = quarter_losses(run)
        curves[LOW_NOISE] = by_quarter.isel(quarter=0)
        curves[HIGH_NOISE] = by_quarter.isel(quarter=-1)
        by_task = mean_loss(run["val_loss"])
        for task, label in enumerate(run["interval"].values):
            curves[f"{VAL_LOSS}_{label}"] = by_task.isel(task=task)
    if "train_loss" in run:
        curves[TRAIN_LOSS] = uniform_loss(run, "train")
    if "gramian" in run:
        curves[CONFLICT_RATE] = rates_by_step(run_gramian(run), run["group_count"])
    if "activation_mean_square" in run:
        effective = effective_channels(run_energy(run))
        curves[EFFECTIVE_CHANNELS] = effective.mean(("block", "task"))
    return curves


def runs_frame(runs: Sequence[xr.Dataset]) -> pd.DataFrame:
    """One row per run: what it is, its last validation losses, and its conflict rate over all probes.

    Returns:
        Columns run, name, method, seed, status, experiment, comparison, dataset, parameters, step (of the last
        validation), val_loss, low_noise, high_noise, conflict_rate, conflict_rate_error (see
        `jackknife.quotable_error`). NaN where not measured.
    """
    return pd.DataFrame([_run_row(run) for run in runs])


def _run_row(run: xr.Dataset) -> dict[str, object]:
    row: dict[str, object] = {"run": run.attrs["run_id"]}
    for name in ("name", "method", "seed", "status", "experiment", "comparison", "dataset"):
        row[name] = run.attrs[name]
    row["parameters"] = RunManifest.from_json(run.attrs["manifest"]).parameters
    row |= {"step": 0, "val_loss": np.nan, "low_noise": np.nan, "high_noise": np.nan}
    if "val_loss" in run:
        last = run.isel(val_step=-1)
        by_quarter = quarter_losses(last)
        row["step"] = int(run["val_step"][-1])
        row["val_loss"] = float(uniform_loss(last, "val"))
        row["low_noise"], row["high_noise"] = float(by_quarter[0]), float(by_quarter[-1])
    conflict = _conflict_rate(run) if "gramian" in run else None
    row["conflict_rate"] = np.nan if conflict is None else float(conflict["rate"])
    row["conflict_rate_error"] = np.nan if conflict is None else float(quotable_error(conflict))
    return row


def interval_losses(runs: Sequence[xr.Dataset]) -> pd.DataFrame:
    """Last validation loss of every interval: columns method, seed, task, value (mean over runs of equal seed)."""
    rows = [
        (run.attrs["method"], run.attrs["seed"], task, float(value))
        for run in runs
        if "val_loss" in run
        for task, value in enumerate(mean_loss(run["val_loss"]).isel(val_step=-1).values)
    ]
    table = pd.DataFrame(rows, columns=["method", "seed", "task", "value"])
    return table.groupby(["method", "seed", "task"], as_index=False)[["value"]].mean()


def interval_changes(losses: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Losses relative to the reference method's with the same seed: columns method, seed, task, change, mean.

    ``change`` is value / reference - 1, ``mean`` its mean over seeds. The reference itself is left out.
    """
    own = losses[losses["method"] == reference].drop(columns="method")
    paired = losses[losses["method"] != reference].merge(own, on=["seed", "task"], suffixes=("", "_reference"))
    paired["change"] = paired["value"] / paired["value_reference"] - 1
    paired["mean"] = paired.groupby(["method", "task"])["change"].transform("mean")
    return paired.loc[:, ["method", "seed", "task", "change", "mean"]]


def _conflict_rate(run: xr.Dataset) -> xr.Dataset:
    return probe_rate(run_gramian(run), run["group_count"])
