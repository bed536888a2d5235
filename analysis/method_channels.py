"""The channels of all runs of a method, stacked: a statistic of `activations` or `routing_budget` is then one call.

Run by run, labels would take far longer than numbers: figures of a hundred runs would take a minute.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import xarray as xr

from analysis import grouping
from analysis.activations import STEP, Site, channel_usage, late_energy
from analysis.forked import forked_calls
from analysis.routing_budget import mask_use, measured_use


class MethodChannels:
    """The runs of one method that have the blocks of its first one, each quantity computed when it is first needed.

    Args:
        runs: Of one method, with probes of channels.
    """

    def __init__(self, runs: Sequence[xr.Dataset]) -> None:
        self.runs = grouping.with_same_blocks(runs)
        self._late: dict[Site, xr.DataArray] = {}
        self._energy: dict[Site, xr.DataArray] = {}

    @property
    def routed(self) -> bool:
        """Whether the runs have masks."""
        return all("mask" in run for run in self.runs)

    def late(self, site: Site = "input") -> xr.DataArray:
        """`activations.late_energy` of each run: (run, activation_step, block, task, channel).

        Probes are numbered from 0; where a run has fewer than another, the last ones are NaN.
        """
        if site not in self._late:
            each = [late_energy(run, site).drop_vars(STEP) for run in self.runs]
            most = max(energy.sizes[STEP] for energy in each)
            self._late[site] = grouping.stack_runs([_filled(energy, most) for energy in each])
        return self._late[site]

    def energy(self, site: Site = "input") -> xr.DataArray:
        """`activations.pooled_energy` of each run: (run, block, task, channel)."""
        if site not in self._energy:
            self._energy[site] = self.late(site).mean(STEP)
        return self._energy[site]

    @functools.cached_property
    def allowed(self) -> xr.DataArray:
        """`routing_budget.mask_use` of each run: (run, block, task, channel)."""
        return grouping.stack_runs([mask_use(run) for run in self.runs])

    @functools.cached_property
    def measured(self) -> xr.DataArray:
        """`routing_budget.measured_use` of each run: (run, block, task, channel)."""
        return measured_use(self.allowed, self.energy())

    def keep(self, late: xr.DataArray, energy: xr.DataArray, allowed: xr.DataArray, measured: xr.DataArray) -> None:
        """Takes over what another process computed for the input."""
        self._late["input"], self._energy["input"] = late, energy
        self.allowed, self.measured = allowed, measured

    def usage(self, site: Site = "input") -> xr.Dataset:
        """`routing_budget.run_usage` of each run: (run, block) and (run, block, task)."""
        return channel_usage(self.energy(site), self.allowed > 0 if site == "input" else None)


def _filled(energy: xr.DataArray, probes: int) -> xr.DataArray:
    lacking = probes - energy.sizes[STEP]
    return energy.pad({STEP: (0, lacking)}) if lacking else energy


def prepare(channels: Sequence[MethodChannels]) -> None:
    """Computes what most figures need, side by side, before processes are forked that would each compute it."""

    def needed(own: MethodChannels) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray, xr.DataArray]:
        return own.late(), own.energy(), own.allowed, own.measured

    found = forked_calls([functools.partial(needed, own) for own in channels])
    for own, parts in zip(channels, found, strict=True):
        own.keep(*parts)


def method_channels(runs: Sequence[xr.Dataset]) -> dict[str, MethodChannels]:
    """Method -> the channels of those of its runs that have probes of them, in the order of `methods.ordered`."""
    measured = [run for run in runs if "activation_mean_square" in run]
    return {method: MethodChannels(own) for method, own in grouping.group_by_method(measured).items()}
