"""Grids of routings and optimisations, written out by hand or made of runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from analysis.grid import LOSSES, OPTIMISATION, ROUTING

ROUTINGS = ("plain", "random", "dtr")
OPTIMISATIONS = ("uniform", "min_snr", "pcgrad")
Values = Mapping[tuple[str, str], Sequence[float]]


def grid_of(
    values: Values, routings: Sequence[str] = ROUTINGS, optimisations: Sequence[str] = OPTIMISATIONS
) -> pd.DataFrame:
    """A `grid.grid_frame` with the values of seeds 0, 1, … of each cell as all three losses; NaN diverged."""
    rows = [
        {"run": f"{routing}-{optimisation}-{seed}", ROUTING: routing, OPTIMISATION: optimisation, "seed": seed}
        | dict.fromkeys(LOSSES, value)
        for (routing, optimisation), own in values.items()
        for seed, value in enumerate(own)
    ]
    frame = pd.DataFrame(rows).assign(step=100, seconds=np.nan, seconds_per_step=np.nan)
    frame["name"] = frame["method"] = frame["run"]
    frame[ROUTING] = pd.Categorical(frame[ROUTING], list(routings), ordered=True)
    frame[OPTIMISATION] = pd.Categorical(frame[OPTIMISATION], list(optimisations), ordered=True)
    return frame


def noise_grid(rng: np.random.Generator, seeds: int, effect: Values | None = None) -> pd.DataFrame:
    """Every cell is its seed's own level, noise of its own, and an effect if one is given for it."""
    level = rng.normal(0, 3, seeds)
    cells = itertools.product(ROUTINGS, OPTIMISATIONS)
    return grid_of({cell: level + rng.standard_normal(seeds) + (effect or {}).get(cell, 0.0) for cell in cells})


def cell_run(run: xr.Dataset, routing: str, optimisation: str, factor: float = 1.0) -> xr.Dataset:
    """The run as one of a cell, with its validation losses multiplied."""
    moment = run.val_loss.moment == "sum"
    names = ("val_loss", "val_quarter_loss", "val_timestep_loss")
    scaled = run.assign({name: run[name].where(~moment, run[name] * factor) for name in names})
    cell = f"routing={routing},optimisation={optimisation}"
    return scaled.assign_attrs(cell=cell, run_id=f"{cell}-{run.attrs['seed']}", name=f"{cell}-{run.attrs['seed']}")
