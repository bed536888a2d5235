"""The runs of each method together, and means over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import xarray as xr

from analysis.methods import ordered
from lightning_modules.tracking.records import RunManifest

Runs = xr.Dataset | Sequence[xr.Dataset]
"""One run or several."""
Labelled = TypeVar("Labelled", xr.DataArray, xr.Dataset)


def as_list(runs: Runs) -> Sequence[xr.Dataset]:
    """One run or several, as several."""
    return [runs] if isinstance(runs, xr.Dataset) else runs


def group_by_method(runs: Sequence[xr.Dataset]) -> dict[str, list[xr.Dataset]]:
    """Method -> its runs, in the order of `methods.ordered`."""
    methods = ordered(run.attrs["method"] for run in runs)
    return {method: [run for run in runs if run.attrs["method"] == method] for method in methods}


def with_same_blocks(runs: Sequence[xr.Dataset]) -> list[xr.Dataset]:
    """The runs that have the blocks of the first one, so that a value of each block can be averaged over them."""
    blocks = [RunManifest.from_json(run.attrs["manifest"]).block_channels for run in runs]
    return [run for run, own in zip(runs, blocks, strict=True) if own == blocks[0]]


def mean_over_runs(values: Sequence[Labelled]) -> Labelled:
    """Mean of one value per run, all of the same form; NaN is left out."""
    return stack_runs(values).mean("run")


def stack_runs(values: Sequence[Labelled]) -> Labelled:
    """One value per run, all of the same form, along a new first dimension ``run``."""
    return xr.concat(values, "run", coords="minimal", compat="override")
