"""The routing budget: how many channels each task gets, with whom it shares them, and whether it uses them.

`mask_use` says how often the masks of a run let a task use a channel, `measured_use` how often it did. Both have the
form (block, task, channel), values in [0, 1], NaN for channels that a narrow block lacks, and all else takes either. A
plain run's masks allow everything.

Source: DTR (Park et al., arXiv 2310.07138), section 4; that shared and task-specific channels are to be told apart is
what its reviewers asked for.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import xarray as xr

from analysis.activations import USED_SHARE, Site, channel_usage, pooled_energy, used_channels
from lightning_modules.tracking.records import RunManifest

GROUPS = ("always", "all_tasks", "some_tasks", "own")
"""Whom a task shares a channel with: every timestep of all tasks; all tasks, at some timesteps; some of them; none."""


def mask_use(run: xr.Dataset) -> xr.DataArray:
    """The share of each task's timesteps at which the mask lets it use each channel: (block, task, channel).

    1 everywhere for a plain run. Absent channels are NaN.
    """
    width = RunManifest.from_json(run.attrs["manifest"]).block_channels
    channel = np.arange(max(width.values()))
    exists = channel < np.array(list(width.values()))[:, None]
    coords = {name: coord for name, coord in run.coords.items() if coord.dims == ("task",)}
    use = np.ones((len(width), run.sizes["task"], channel.size))
    if "mask" in run:
        starts = tuple(run["t_low"].values.tolist())
        for block, mask in enumerate(run["mask"].values):
            use[block] = _interval_use(mask.tobytes(), run.sizes["timestep"], starts)
    labelled = xr.DataArray(
        np.where(exists[:, None], use, np.nan),
        dims=("block", "task", "channel"),
        coords={"block": list(width), "channel": channel, **coords},
        name="mask use",
    )
    return labelled.assign_attrs(long_name="share of the timesteps at which a channel is allowed")


@functools.lru_cache(maxsize=64)
def _interval_use(mask: bytes, num_timesteps: int, starts: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """(task, channel); most blocks share one mask, and so do most runs of a method."""
    allowed = np.frombuffer(mask, dtype=bool).reshape(num_timesteps, -1)
    timesteps = np.diff([*starts, num_timesteps])[:, None]
    return np.add.reduceat(allowed, starts, axis=0, dtype=np.int64) / timesteps


def measured_use(allowed: xr.DataArray, energy: xr.DataArray, *, share: float = USED_SHARE) -> xr.DataArray:
    """`mask_use` of the channels that a task was found to use, 0 for the others.

    Energies are measured task by task: at which of its timesteps a task uses a channel only the mask tells, so a plain
    model's are 0 or 1. NaN for tasks that were not measured.

    Args:
        allowed: (..., task, channel) of `mask_use`.
        energy: Likewise, such as `activations.pooled_energy`.
        share: See `activations.used_channels`.
    """
    use = allowed.where(used_channels(energy, share), 0.0).where(energy.notnull())
    return use.rename("measured use").assign_attrs(long_name="share of the timesteps at which a channel is used")


def run_usage(run: xr.Dataset, site: Site = "input", *, share: float = USED_SHARE) -> xr.Dataset:
    """`activations.channel_usage` of a run at the end of training, beside its masks, which concern the input only.

    Over training it is ``channel_usage(run_energy(run), mask_use(run) > 0)``.

    Raises:
        UserInputError: If the run has no probes of channels.
    """
    allowed = mask_use(run) > 0 if site == "input" else None
    return channel_usage(pooled_energy(run, site), allowed, share=share)


def routing_budget(use: xr.DataArray) -> xr.Dataset:
    """How many channels a timestep of each task has, and with whom it shares them.

    Args:
        use: (..., task, channel) of `mask_use` or `measured_use`.

    Returns:
        Numbers of channels; divide by ``width`` to compare blocks.

        - ``width`` (...): channels that exist.
        - ``per_timestep`` (..., task, group): channels that a timestep of the task uses, on average, by `GROUPS`:
          ``always``, used at every timestep of all tasks; ``all_tasks``, used by all tasks, but not always;
          ``some_tasks``, shared with some other task; ``own``, used by no other task.
        - ``reach`` (..., task): channels used at any timestep of the task.
        - ``churn`` (..., task): those of them that are not used at all of its timesteps.
        - ``turnover`` (..., task): channels that one timestep of the task uses and another one, drawn at random from
          the task, does not, on average.
    """
    exists = use.notnull()
    measured = exists.any("channel")
    used = use > 0
    users = used.sum("task")
    always = ((use == 1) | ~measured).all("task")
    everyone = users == measured.sum("task")
    some = ~everyone & (users > 1)
    groups = dict(zip(GROUPS, (always, everyone & ~always, some, ~everyone & (users == 1)), strict=True))
    per_timestep = xr.concat(
        [use.where(chosen, 0.0).sum("channel") for chosen in groups.values()],
        xr.DataArray(list(groups), dims="group", name="group"),
    ).transpose(..., "group")
    found = {
        "per_timestep": per_timestep,
        "reach": used.sum("channel"),
        "churn": (used & (use < 1)).sum("channel"),
        "turnover": (use * (1 - use)).sum("channel"),
    }
    return xr.Dataset({"width": exists.any("task").sum("channel")} | {k: v.where(measured) for k, v in found.items()})


def channel_frequency(use: xr.DataArray) -> xr.DataArray:
    """The share of all timesteps at which each channel is used: (..., channel).

    Args:
        use: (..., task, channel) of `mask_use` or `measured_use`, with the bounds of the tasks as coordinates. Tasks
            that were not measured are left out.
    """
    timesteps = use["t_high"] - use["t_low"] + 1
    return use.weighted(timesteps).mean("task")


def mask_adherence(run: xr.Dataset, *, share: float = USED_SHARE) -> xr.Dataset:
    """How far the use of channels follows the mask, at the input of the blocks' branches at the end of training.

    Args:
        run: A routed run with probes of channels.
        share: See `activations.used_channels`.

    Returns:
        (block, task): ``outside``, the share of the energy on channels that the mask turns off at every timestep of the
        task, 0 if masking works; ``allowed``, the number of channels it turns on at any; ``used_of_allowed``, the share
        of those that the task uses. NaN where a task was not measured.

    Raises:
        ValueError: If the run is plain and has no masks.
        UserInputError: If the run has no probes of channels.
    """
    if "mask" not in run:
        raise ValueError(f"run {run.attrs.get('name', '')} is not routed: it has no channel masks to follow")
    return adherence(pooled_energy(run), mask_use(run) > 0, share=share)


def adherence(energy: xr.DataArray, allowed: xr.DataArray, *, share: float = USED_SHARE) -> xr.Dataset:
    """`mask_adherence` of energies (..., task, channel) to the channels that tasks may use, booleans alike."""
    total, count = energy.sum("channel"), allowed.sum("channel")
    used = (used_channels(energy, share) & allowed).sum("channel")
    return xr.Dataset(
        {
            "outside": energy.where(~allowed).sum("channel") / total.where(total > 0),
            "allowed": count,
            "used_of_allowed": (used / count.where(count > 0)).where(energy.notnull().any("channel")),
        }
    )
