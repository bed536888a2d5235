"""What tasks do with channels: used and dead, effective number, specialisation, overlap.

Everything follows from the mean square ("energy") of a channel while a task is processed,
``activation_mean_square`` (activation_step, block, site, task, channel). Channels that a narrow block lacks are NaN and
count nowhere.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis.affinity import jaccard

USED_SHARE = 1e-4
"""A channel is used by a task if its energy is at least this share of the mean over the block's channels.

The same threshold as the scalar ``activation/dead_fraction`` that is logged during training.
"""


def used_channels(energy: xr.DataArray, share: float = USED_SHARE) -> xr.DataArray:
    """Whether each task uses each channel: (..., task, channel) booleans.

    Args:
        energy: (..., task, channel) mean squares.
        share: Least energy, relative to the mean over the channels of the same block and task.
    """
    mean = energy.mean("channel")
    # A task that a block does not serve at all has no energy, and uses nothing.
    return (energy >= share * mean) & (energy > 0)


def dead_fraction(energy: xr.DataArray, share: float = USED_SHARE) -> xr.DataArray:
    """Share of the channels that no task uses: (...)."""
    exists = energy.notnull().any("task")
    dead = exists & ~used_channels(energy, share).any("task")
    return dead.sum("channel") / exists.sum("channel").where(lambda count: count > 0)


def effective_channels(energy: xr.DataArray) -> xr.DataArray:
    """Participation ratio (Σ_c m_c)² / Σ_c m_c² of the energies m_c: (..., task), between 1 and C.

    C if all channels carry the same energy, 1 if one carries all; n equal channels and C - n silent ones give n.
    """
    squares = (energy**2).sum("channel")
    return energy.sum("channel") ** 2 / squares.where(squares > 0)


def specialisation(energy: xr.DataArray) -> xr.DataArray:
    """How much of a channel's energy belongs to few tasks: (..., channel), 0 (all alike) to 1 (one task alone).

    1 - H(p) / ln K, with p_k the task's share of the channel's energy and H its entropy. Energies are first divided by
    the task's total over channels, so that a task that is loud everywhere does not make all channels look specialised.
    NaN for dead channels.
    """
    relative = energy / energy.sum("channel").where(lambda total: total > 0)
    total = relative.sum("task")
    p = relative / total.where(total > 0)
    entropy = -(p * np.log(p.where(p > 0))).sum("task")
    return (1 - entropy / np.log(energy.sizes["task"])).where(total > 0)


def active_overlap(energy: xr.DataArray, share: float = USED_SHARE) -> xr.DataArray:
    """Jaccard index of the channels that two tasks use, averaged over all other dimensions: (task, other_task).

    Comparable with `affinity.mask_overlap`, which tells what a routing method allows rather than what is used.
    """
    used = used_channels(energy, share).transpose(..., "task", "channel")
    sets = used.values.reshape(-1, *used.shape[-2:])
    matrix = np.mean([jaccard(each) for each in sets], axis=0)
    own = {name: coord for name, coord in energy.coords.items() if coord.dims == ("task",)}
    other = {f"other_{name}": ("other_task", coord.values) for name, coord in own.items()}
    return xr.DataArray(matrix, dims=("task", "other_task"), coords={**own, **other}, name="active overlap")
