"""A grid of routings and optimisations: the final values of its cells, what each choice changes, and whether both add
up.

A *cell* is one routing with one optimisation, trained with several seeds. Runs of one seed share initialisation, data
order, timesteps and noise, so that all differences are taken within a seed; the intervals are over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

import numpy as np
import pandas as pd
import xarray as xr

from analysis.frames import runs_frame
from analysis.methods import BASELINE, PLAIN, UNIFORM, ordered, split_method
from analysis.significance import FALSE_DISCOVERY_RATE, q_values
from analysis.uncertainty import ENOUGH_TO_CLAIM, mean_interval, mean_p_value
from lightning_modules.tracking.records import cell_choices

ROUTING, OPTIMISATION = "routing", "optimisation"
Effect = Literal["routing", "optimisation", "interaction"]
EFFECTS: tuple[Effect, ...] = get_args(Effect)
LOSSES = ("val_loss", "low_noise", "high_noise")
_VALUES = ("step", *LOSSES, "seconds", "seconds_per_step")
Places = tuple[list[str], list[str]]


def grid_frame(runs: Sequence[xr.Dataset], axes: Mapping[str, Sequence[str]] | None = None) -> pd.DataFrame:
    """One row per run: its cell, its final values, what it cost.

    The cell is read from the attribute ``cell`` (the tag `records.TAG_CELL`): the choice on the axis ``routing``, and
    those on all other axes, joined by "+", as the optimisation. What the tag does not say follows from the method:
    ``baseline`` is called `PLAIN` here, and training as usual `UNIFORM`.

    Args:
        runs: Of `runs.load_runs`.
        axes: Axis -> its choices, in the order of tables, also those that no run has; by default those of the runs.

    Returns:
        Columns run, name, method, routing and optimisation (categories, ordered), seed, step (of the last validation),
        val_loss, low_noise, high_noise (final validation loss overall, and of the first and the last quarter of T),
        seconds (in training steps, NaN if not measured), seconds_per_step, and one for each MLflow metric
        ``fidelity/<name>`` of any run.
    """
    table = runs_frame(runs)
    cells = [_cell_of(run) for run in runs]
    frame = table[["run", "name", "method"]].copy()
    for place, (column, choices) in enumerate(zip((ROUTING, OPTIMISATION), _choices(cells, axes), strict=True)):
        frame[column] = pd.Categorical([cell[place] for cell in cells], choices, ordered=True)
    frame["seed"] = table["seed"]
    frame[["step", *LOSSES]] = table[["step", *LOSSES]]
    frame["seconds"] = [_seconds(run) for run in runs]
    frame["seconds_per_step"] = [_seconds(run) / _clocked_steps(run) for run in runs]
    fidelity = pd.DataFrame([run.attrs.get("fidelity", {}) for run in runs], index=frame.index)
    frame = pd.concat([frame, fidelity], axis=1)
    return frame.sort_values([ROUTING, OPTIMISATION, "seed"], kind="stable", ignore_index=True)


def fidelity_columns(frame: pd.DataFrame) -> list[str]:
    """The columns of a `grid_frame` that came from metrics ``fidelity/<name>``."""
    known = {"run", "name", "method", ROUTING, OPTIMISATION, "seed", *_VALUES}
    return [str(name) for name in frame.columns if name not in known]


def grid_axes(frame: pd.DataFrame) -> Places:
    """The routings and the optimisations of a `grid_frame`, in order, also those without runs."""
    routings, optimisations = (list(map(str, frame[axis].cat.categories)) for axis in (ROUTING, OPTIMISATION))
    return routings, optimisations


def base_choice(choices: Sequence[str], wanted: str) -> str:
    """What the others of an axis are compared with: the choice of that name, else the first one."""
    return wanted if wanted in choices else choices[0]


def grid_cells(frame: pd.DataFrame, quantity: str = "val_loss") -> pd.DataFrame:
    """Mean of one quantity over the seeds of each cell, with its 95 % interval.

    Returns:
        A row per cell, also those without runs: columns routing, optimisation, seeds, mean, low, high
        (`uncertainty.mean_interval`; NaN for the ends with one seed), diverged (runs without a finite value, which make
        the mean NaN: leaving them out would flatter the cell).
    """
    by_seed = _by_seed(frame, quantity)
    rows = []
    for routing, optimisation in _all_cells(frame):
        values = by_seed.get((routing, optimisation), pd.Series(dtype=float))
        with np.errstate(invalid="ignore"):  # infinite, if a run diverged
            interval = mean_interval(values.to_numpy())
        row = {ROUTING: routing, OPTIMISATION: optimisation, "seeds": interval.count, "mean": interval.estimate}
        rows.append(row | {"low": interval.low, "high": interval.high, "diverged": int((~np.isfinite(values)).sum())})
    return pd.DataFrame(rows)


def seed_effects(
    frame: pd.DataFrame, quantity: str = "val_loss", reference: str = PLAIN, uniform: str = UNIFORM
) -> pd.DataFrame:
    """What each choice changes, seed by seed.

    Args:
        frame: `grid_frame`.
        quantity: One of its columns.
        reference: The routing that others are compared with; the first one if there is none of that name.
        uniform: The optimisation that others are compared with; likewise.

    Returns:
        Columns effect, routing, optimisation, seed, value. The effect ``routing`` is the cell minus the reference
        routing with the same optimisation; ``optimisation``: the cell minus the uniform one with the same routing;
        ``interaction``: the difference of these differences, (cell - reference) - (the same under uniform). Each with
        the seeds that all runs needed for it have; NaN where one of them diverged.
    """
    routings, optimisations = grid_axes(frame)
    plain, usual = base_choice(routings, reference), base_choice(optimisations, uniform)
    by_seed = _by_seed(frame, quantity)
    pieces = []
    for routing, optimisation in _all_cells(frame):
        other, own = routing != plain, optimisation != usual
        terms: dict[str, list[tuple[tuple[str, str], int]]] = {
            "routing": [((routing, optimisation), 1), ((plain, optimisation), -1)] * other,
            "optimisation": [((routing, optimisation), 1), ((routing, usual), -1)] * own,
        }
        terms["interaction"] = [*terms["routing"], ((routing, usual), -1), ((plain, usual), 1)] if other and own else []
        for effect, needed in terms.items():
            if needed and all(cell in by_seed for cell, _ in needed):
                together = pd.concat([sign * by_seed[cell] for cell, sign in needed], axis=1, join="inner")
                value = together.sum(axis=1, skipna=False)
                labels = {"effect": effect, ROUTING: routing, OPTIMISATION: optimisation}
                pieces.append(pd.DataFrame({"seed": value.index, "value": value.to_numpy()}).assign(**labels))
    columns = ["effect", ROUTING, OPTIMISATION, "seed", "value"]
    return pd.concat(pieces, ignore_index=True)[columns] if pieces else pd.DataFrame(columns=columns)


def effect_intervals(by_seed: pd.DataFrame) -> pd.DataFrame:
    """Means of `seed_effects` over seeds, with intervals, tests, and false discovery control over all of them together.

    The t-tests share runs, so they depend on one another in both directions; Benjamini and Hochberg's procedure is
    known to hold for independent and positively dependent tests, and is taken for approximate here.

    Returns:
        A row per effect, routing and optimisation: columns seeds, estimate, low, high (95 %, of a single comparison),
        p_value (NaN with one seed), q_value (over all rows), significant (q-value at most 5 %, and at least
        `uncertainty.ENOUGH_TO_CLAIM` seeds).
    """
    rows = []
    for (effect, routing, optimisation), own in by_seed.groupby(["effect", ROUTING, OPTIMISATION], sort=False):
        values = own["value"].to_numpy(dtype=float)
        with np.errstate(invalid="ignore"):
            interval = mean_interval(values)
        labels = {"effect": effect, ROUTING: routing, OPTIMISATION: optimisation, "seeds": interval.count}
        ends = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
        rows.append(labels | ends | {"p_value": mean_p_value(values)})
    columns = ["effect", ROUTING, OPTIMISATION, "seeds", "estimate", "low", "high", "p_value"]
    table = pd.DataFrame(rows, columns=columns)
    table["q_value"] = q_values(table["p_value"])
    table["significant"] = (table["q_value"] <= FALSE_DISCOVERY_RATE) & (table["seeds"] >= ENOUGH_TO_CLAIM)
    return table


def grid_table(
    frame: pd.DataFrame, reference: str = PLAIN, uniform: str = UNIFORM, quantity: str = "val_loss"
) -> pd.DataFrame:
    """The grid as one table, a row per optimisation: what `grid_cells` and `effect_intervals` say, side by side.

    Args:
        frame: `grid_frame`.
        reference: As of `seed_effects`.
        uniform: Likewise.
        quantity: Column of the frame.

    Returns:
        Index optimisation. For each routing R: R, R_low, R_high, R_seeds; for each but the reference P: R_minus_P with
        _low, _high, _q; for each: R_minus_U, the optimisation against the uniform one U, likewise; for each but the
        reference: R_interaction, likewise. NaN where cells are missing.
    """
    routings, optimisations = grid_axes(frame)
    plain, usual = base_choice(routings, reference), base_choice(optimisations, uniform)
    cells = grid_cells(frame, quantity).set_index([ROUTING, OPTIMISATION])
    effects = effect_intervals(seed_effects(frame, quantity, reference, uniform))
    columns: dict[str, pd.Series] = {}
    for routing in routings:
        own = cells.loc[routing].reindex(optimisations)
        ends = {"": own["mean"], "_low": own["low"], "_high": own["high"], "_seeds": own["seeds"]}
        columns |= {f"{routing}{end}": values for end, values in ends.items()}
    headings = {"routing": f"minus_{plain}", "optimisation": f"minus_{usual}", "interaction": "interaction"}
    for effect, heading in headings.items():
        for routing in routings:
            if effect != "optimisation" and routing == plain:
                continue
            own = effects[(effects["effect"] == effect) & (effects[ROUTING] == routing)]
            own = own.set_index(OPTIMISATION).reindex(optimisations)
            ends = {"": own["estimate"], "_low": own["low"], "_high": own["high"], "_q": own["q_value"]}
            columns |= {f"{routing}_{heading}{end}": values for end, values in ends.items()}
    return pd.DataFrame(columns).rename_axis(OPTIMISATION)


def best_cells(frame: pd.DataFrame, quantity: str = "val_loss") -> pd.Series:
    """The best routing of each optimisation, where it is known to be: lower than every other routing of the row.

    Each other routing is compared with it, paired by seed; the row's p-value is the largest of these, and p-values are
    adjusted over rows (false discovery rate 5 %), with at least `uncertainty.ENOUGH_TO_CLAIM` seeds.

    Returns:
        Optimisation -> routing, without those where that is open.
    """
    routings, optimisations = grid_axes(frame)
    by_seed = _by_seed(frame, quantity)
    found: dict[str, tuple[str, float]] = {}
    for optimisation in optimisations:
        if len(routings) < 2 or not all((each, optimisation) in by_seed for each in routings):
            continue
        row = pd.concat({each: by_seed[each, optimisation] for each in routings}, axis=1, join="inner")
        if len(row) >= ENOUGH_TO_CLAIM and np.isfinite(row).all(axis=None):
            best = str(row.mean().idxmin())
            others = row.drop(columns=best)
            found[optimisation] = best, max(mean_p_value((row[best] - others[each]).to_numpy()) for each in others)
    table = pd.DataFrame.from_dict(found, orient="index", columns=["routing", "p_value"])
    return table.loc[q_values(table["p_value"]) <= FALSE_DISCOVERY_RATE, "routing"]


def _all_cells(frame: pd.DataFrame) -> list[tuple[str, str]]:
    routings, optimisations = grid_axes(frame)
    return [(routing, optimisation) for optimisation in optimisations for routing in routings]


def _by_seed(frame: pd.DataFrame, quantity: str) -> dict[tuple[str, str], pd.Series]:
    """(routing, optimisation) -> value by seed; the mean where a cell has several runs with one seed."""
    measured = frame.dropna(subset=quantity) if quantity not in LOSSES else frame
    grouped = measured.groupby([ROUTING, OPTIMISATION], observed=True)
    return {
        cast("tuple[str, str]", cell): own.groupby("seed")[quantity].agg(lambda values: values.mean(skipna=False))
        for cell, own in grouped
    }


def _cell_of(run: xr.Dataset) -> tuple[str, str]:
    choices = cell_choices(str(run.attrs.get("cell", "")))
    parts = split_method(run.attrs["method"])
    routing = choices.pop(ROUTING, PLAIN if parts.routing == BASELINE else parts.routing)
    return routing, "+".join(choices.values()) or parts.optimisation or UNIFORM


def _choices(cells: Sequence[tuple[str, str]], axes: Mapping[str, Sequence[str]] | None) -> Places:
    """Routings and optimisations in order: those of the axes, then others that runs have."""
    given = dict(axes or {})
    routings = list(given.pop(ROUTING, ()))
    optimisations = [""] if given else []
    for choices in given.values():
        optimisations = [f"{before}+{each}".removeprefix("+") for before in optimisations for each in choices]
    # Those that no axis lists follow in the order of their methods' tags.
    by_tag = {BASELINE if routing == PLAIN else routing: routing for routing, _ in cells}
    routings += [by_tag[tag] for tag in ordered(by_tag)]
    by_tag = {f"{BASELINE}+{used}".removesuffix(f"+{UNIFORM}"): used for _, used in cells}
    optimisations += [by_tag[tag] for tag in ordered(by_tag)]
    return list(dict.fromkeys(routings)), list(dict.fromkeys(optimisations))


def _seconds(run: xr.Dataset) -> float:
    return float(run["training_seconds"][-1]) if "training_seconds" in run else np.nan


def _clocked_steps(run: xr.Dataset) -> float:
    return float(run["clock_step"][-1]) if "training_seconds" in run else np.nan
