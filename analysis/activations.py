"""What tasks do with channels: used and dead, effective number, specialisation, overlap.

Everything follows from the mean square ("energy") of a channel while a task is processed,
``activation_mean_square`` (activation_step, block, site, task, channel), where site ``"input"`` is what a block's
branches read, masked, and ``"update"`` what they add. Channels that a narrow block lacks are NaN and count nowhere; so
do tasks that had no sample. What the masks of a routed run allow has the same form, `routing_budget.mask_use`, so that
overlap and specialisation can be taken of it, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import xarray as xr
from scipy.special import digamma

from analysis.affinity import jaccard
from lightning_modules.errors import UserInputError

STEP = "activation_step"
Site = Literal["input", "update"]
USED_SHARE = 1e-4
"""A channel is used by a task if its energy is at least this share of the mean over the block's channels.

The same threshold as the scalar ``activation/dead_fraction`` that is logged during training, which is ``idle_share`` of
`channel_usage`, averaged over blocks and tasks.
"""
LATE_PART = 0.25
"""The part of training, at its end, that a finished model is judged by."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def run_energy(run: xr.Dataset, site: Site = "input") -> xr.DataArray:
    """Mean squares of all probes of a run: (activation_step, block, task, channel).

    Raises:
        UserInputError: If the run has no probes of channels.
    """
    if "activation_mean_square" not in run:
        raise UserInputError(
            f"run {run.attrs.get('name', '')} has no channel activations: train with channel_activation.every_n_steps "
            "above 0"
        )
    return run["activation_mean_square"].sel(site=site, drop=True)


def late_energy(run: xr.Dataset, site: Site = "input", part: float = LATE_PART) -> xr.DataArray:
    """`run_energy` of the last part of training, at least its last probe.

    A single probe sees few images of each task. `pooled_energy` is the mean over these probes, and
    `unspecialised_reference` finds from their differences how far to trust it.

    Args:
        run: A run with probes of channels.
        site: What is measured.
        part: Share of the steps, counted from the end.

    Raises:
        UserInputError: If the run has no probes of channels.
    """
    energy = run_energy(run, site)
    return energy.sel({STEP: energy[STEP] > (1 - part) * energy[STEP][-1]})


def pooled_energy(run: xr.Dataset, site: Site = "input") -> xr.DataArray:
    """Mean over the probes of `late_energy`, each of which has as many samples: (block, task, channel)."""
    return late_energy(run, site).mean(STEP)


def used_channels(energy: xr.DataArray, share: float = USED_SHARE) -> xr.DataArray:
    """Whether each task uses each channel: (..., task, channel) booleans.

    Args:
        energy: (..., task, channel) mean squares.
        share: Least energy, relative to the mean over the channels of the same block and task.
    """
    mean = energy.mean("channel")
    # A task that a block does not serve at all has no energy, and uses nothing.
    return (energy >= share * mean) & (energy > 0)


def channel_usage(
    energy: xr.DataArray, allowed: xr.DataArray | None = None, *, share: float = USED_SHARE
) -> xr.Dataset:
    """How many channels each task uses and leaves idle, and how many are dead.

    Args:
        energy: (..., task, channel) mean squares, of one or many blocks and steps.
        allowed: (..., task, channel) booleans of a routed run: whether the mask lets the task use the channel at any of
            its timesteps, ``routing_budget.mask_use(run) > 0``. It speaks about the site ``"input"`` only.
        share: See `used_channels`.

    Returns:
        Numbers of channels: ``channels`` (...) that exist and ``dead`` (...), used by no task; of each task (..., task)
        ``used``, ``idle`` (all others), which is ``masked`` (not allowed) + ``silent`` (allowed and yet not used), and
        ``effective`` (`effective_channels`). Each but the first also as a share of the channels that exist,
        ``used_share`` and so on. NaN for a task or block that was not measured.
    """
    exists = energy.notnull()
    used = used_channels(energy, share)
    idle = exists & ~used
    masked = idle & ~allowed if allowed is not None else xr.zeros_like(idle)
    channels = exists.any("task").sum("channel")
    by_task = {"used": used, "idle": idle, "masked": masked, "silent": idle & ~masked}
    measured = exists.any("channel")
    counts: dict[str, xr.DataArray] = {name: chosen.sum("channel").where(measured) for name, chosen in by_task.items()}
    counts["effective"] = effective_channels(energy)
    counts["dead"] = (exists & ~used.any("task")).any("task").sum("channel").where(channels > 0)
    shares = {f"{name}_share": count / channels.where(channels > 0) for name, count in counts.items()}
    return xr.Dataset({"channels": channels, **counts, **shares})


def effective_channels(energy: xr.DataArray) -> xr.DataArray:
    """Participation ratio (Σ_c m_c)² / Σ_c m_c² of the energies m_c: (..., task), between 1 and C.

    C if all channels carry the same energy, 1 if one carries all; n equal channels and C - n silent ones give n.
    """
    channels_last = energy.transpose(..., "channel")
    lead = channels_last.isel(channel=0, drop=True)
    effective = np.full(lead.shape, np.nan)
    # Piece by piece: squares of all steps of a long run at once would take more memory than the run.
    for place in np.ndindex(lead.shape[:-2]):
        rows = np.nan_to_num(channels_last.values[place].astype(float), posinf=np.nan, neginf=np.nan)
        total, squares = rows.sum(-1), (rows**2).sum(-1)
        np.divide(total**2, squares, out=effective[place], where=squares > 0)
    return lead.copy(data=effective)


def channel_profile(energy: xr.DataArray) -> xr.Dataset:
    """To which tasks each channel belongs.

    Energies are first divided by the task's total over channels, so that a task that is loud everywhere does not make
    all channels look specialised.

    Args:
        energy: (..., task, channel) mean squares.

    Returns:
        NaN for dead channels throughout:

        - ``belonging`` (..., task, channel): p_k, the task's share of the channel's energy.
        - ``specialisation`` (..., channel): 1 - H(p) / ln K, from 0 (all tasks alike) to 1 (one task alone), with H the
          entropy. Noise alone makes it positive, see `unspecialised_reference`.
        - ``effective_tasks`` (..., channel): exp H(p), from 1 to K.
        - ``preferred`` (..., channel): the task with the largest share, and ``concentration``, that share.
    """
    relative = _relative(energy)
    total = relative.sum("task")
    p = relative / total.where(total > 0)
    entropy = -(p * np.log(p.where(p > 0))).sum("task").where(total > 0)
    tasks = energy.notnull().any("channel").sum("task")
    largest = p.max("task")
    numbers = xr.DataArray(np.arange(energy.sizes["task"]), dims="task")
    return xr.Dataset(
        {
            "belonging": p,
            "specialisation": 1 - entropy / np.log(tasks.where(tasks > 1)),
            "effective_tasks": np.exp(entropy),
            "preferred": numbers.where(p == largest).min("task"),
            "concentration": largest,
        }
    )


def unspecialised_reference(energy: xr.DataArray) -> xr.DataArray:
    """The specialisation that noise alone gives, on average, to a channel that all tasks use alike: (..., channel).

    A probe sees few images, so a channel's energy differs between tasks by chance. The relative variance v of its
    pooled energy is taken from the differences of successive probes (von Neumann, Annals of Mathematical Statistics 12,
    1941), one for all tasks, as it would be without specialisation. Gamma-distributed energies, as mean squares of
    Gaussian values are, have shares p of a Dirichlet distribution with concentration a = 1 / v, and so
    1 - E H(p) / ln K = 1 - (ψ(K a + 1) - ψ(a + 1)) / ln K (Wolpert and Wolf, Physical Review E 52, 1995).

    What is not known: the count of a probe does not help, because the tokens of an image are not independent of one
    another, and no fourth moments are recorded. What training changes between two probes counts as noise, so the
    reference errs on the high side; in simulations without such changes it was right to 5 %, and up to 20 % too high
    for two probes of one to three images. It is an average: without specialisation, somewhat less than half of the
    channels lie above.

    Args:
        energy: (activation_step, ..., task, channel) of the probes that are pooled, such as `late_energy`.

    Returns:
        To compare with `channel_profile` of the mean over probes. NaN for dead channels, and everywhere from a single
        probe.
    """
    relative = _relative(energy)
    probes = relative.notnull().sum(STEP)
    variance = (relative.diff(STEP) ** 2).mean(STEP) / 2 / probes.where(probes > 1)
    mean = relative.mean(STEP)
    noise, power = variance.sum("task"), (mean**2).where(variance.notnull()).sum("task")
    tasks = variance.notnull().any("channel").sum("task")
    # The squared mean holds noise, too: 1 / v is the ratio of the signal alone to the noise.
    concentration = (power / noise.where(noise > 0) - 1).clip(min=0)
    expected = xr.apply_ufunc(digamma, tasks * concentration + 1) - xr.apply_ufunc(digamma, concentration + 1)
    reference = 1 - expected / np.log(tasks.where(tasks > 1))
    return reference.where(noise > 0, 0.0).where(power > 0)


def specialisation_by_block(profile: xr.Dataset, quantiles: Sequence[float] = QUANTILES) -> xr.Dataset:
    """The channels of each block together.

    Args:
        profile: Of `channel_profile`.
        quantiles: Which to take.

    Returns:
        Of the channels that are not dead: ``mean`` (...) and ``quantiles`` (quantile, ...) of the specialisation;
        ``preferring`` (..., task): the share of them that each task is the preferred one of (1 / K without
        specialisation), and ``owned`` (..., task): what share of all channels' energy belongs to it, counting every
        channel alike.
    """
    special = profile["specialisation"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")  # a block whose channels are all dead
        quantile = special.quantile(list(quantiles), "channel")
    alive = profile["preferred"].notnull().sum("channel")
    tasks = xr.DataArray(np.arange(profile.sizes["task"]), dims="task")
    preferring = (profile["preferred"] == tasks).sum("channel") / alive.where(alive > 0)
    found = xr.Dataset(
        {
            "mean": special.mean("channel"),
            "quantiles": quantile,
            "preferring": preferring,
            "owned": profile["belonging"].mean("channel"),
        }
    )
    return found.assign_coords({name: coord for name, coord in profile.coords.items() if coord.dims == ("task",)})


def active_overlap(energy: xr.DataArray, *, share: float = USED_SHARE, by_block: bool = False) -> xr.DataArray:
    """Jaccard index of the sets of channels that two tasks use: (task, other_task), or (block, task, other_task).

    Of ``routing_budget.mask_use(run)`` it is that of the channels that each task may use at any of its timesteps;
    `affinity.mask_overlap` compares single timesteps instead, and is smaller where masks change within a task.

    Args:
        energy: (..., task, channel) mean squares. All leading dimensions are averaged over.
        share: See `used_channels`.
        by_block: Whether to keep the blocks apart.
    """
    used = used_channels(energy, share).transpose(..., "task", "channel")
    sets = used.values.reshape(-1, *used.shape[-2:])
    overlap = np.stack([jaccard(each) for each in sets]).reshape(*used.shape[:-1], used.sizes["task"])
    return _pairs(overlap, energy, by_block).rename("active overlap").assign_attrs(long_name="Jaccard index of use")


def energy_overlap(energy: xr.DataArray, *, by_block: bool = False) -> xr.DataArray:
    """Σ_c min(q_kc, q_lc): the part of two tasks' energy that lies in the same channels, with q_k task k's shares.

    1 less the total variation distance of the two distributions over channels. Unlike `active_overlap` it needs no
    threshold, and tells tasks apart that use all channels, but unequally.

    Args:
        energy: (..., task, channel) mean squares. All leading dimensions are averaged over.
        by_block: Whether to keep the blocks apart.

    Returns:
        (task, other_task), or (block, task, other_task).
    """
    shares = np.nan_to_num(_relative(energy).transpose(..., "task", "channel").values)
    # One task at a time: all pairs at once would take K times the memory.
    rows = [np.minimum(shares[..., task, None, :], shares).sum(-1) for task in range(shares.shape[-2])]
    overlap = np.stack(rows, axis=-2)
    return _pairs(overlap, energy, by_block).rename("energy overlap").assign_attrs(long_name="energy in same channels")


def _relative(energy: xr.DataArray) -> xr.DataArray:
    """Shares of the task's energy, in float64."""
    energy = energy.astype(float)
    return energy / energy.sum("channel").where(lambda total: total > 0)


def _pairs(overlap: np.ndarray, energy: xr.DataArray, by_block: bool) -> xr.DataArray:
    """Labels overlaps (..., K, K) as the affinity matrices are and averages; NaN where a task was not measured."""
    lead = [str(dim) for dim in energy.dims if dim not in ("task", "channel")]
    own = {name: coord for name, coord in energy.coords.items() if coord.dims == ("task",)}
    other = {f"other_{name}": ("other_task", coord.values) for name, coord in own.items()}
    kept = {name: coord for name, coord in energy.coords.items() if coord.dims == ("block",)}
    matrix = xr.DataArray(overlap, dims=(*lead, "task", "other_task"), coords={**kept, **own, **other})
    measured = energy.notnull().any("channel").drop_vars(list(own))
    matrix = matrix.where(measured & measured.rename(task="other_task"))
    return matrix.mean([dim for dim in lead if not (by_block and dim == "block")])
