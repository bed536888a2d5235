"""What a grid of routings and optimisations shows, in sentences that claim no more than the seeds can carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.grid import (
    OPTIMISATION,
    ROUTING,
    Effect,
    base_choice,
    effect_intervals,
    grid_axes,
    grid_cells,
    seed_effects,
)
from analysis.methods import PLAIN, UNIFORM, method_name
from analysis.significance import FALSE_DISCOVERY_RATE
from analysis.uncertainty import ENOUGH_TO_CLAIM, Interval, mean_interval, seed_warning

FIRM = 5
"""Below this many seeds a difference that is resolved is called a hint."""


def grid_sentences(
    frame: pd.DataFrame,
    quantity: str = "val_loss",
    words: str = "final validation loss",
    reference: str = PLAIN,
    uniform: str = UNIFORM,
) -> list[str]:
    """Does routing help, do the optimisations, do they add up, and which cell is lowest.

    Args:
        frame: `grid.grid_frame`.
        quantity: One of its columns, lower is better.
        words: What that is.
        reference: The routing that others are compared with; the first one if there is none of that name.
        uniform: The optimisation that others are compared with; likewise.
    """
    routings, optimisations = grid_axes(frame)
    plain, usual = base_choice(routings, reference), base_choice(optimisations, uniform)
    by_seed = seed_effects(frame, quantity, reference, uniform)
    effects = effect_intervals(by_seed)
    routed = [routing for routing in reversed(routings) if routing != plain]  # the control after what it is one of
    said = [_terms_sentence(effects, words), _diverged_sentence(frame, quantity)]
    said += [_average_sentence(by_seed, routing, plain) for routing in routed]
    said += [_sides_sentence(effects, "routing", routing, plain) for routing in routed]
    said += [_sides_sentence(effects, "optimisation", routing, usual) for routing in [plain, *routed]]
    said += [_interaction_sentence(effects, by_seed, routing, plain, usual) for routing in routed]
    said += [_together_sentence(effects, routing, usual) for routing in routed]
    said.append(_lowest_sentence(frame, quantity, plain, usual))
    return [sentence for sentence in said if sentence]


def significant_sentences(frame: pd.DataFrame, quantity: str, words: str) -> list[str]:
    """Which differences of a part of the loss are significant, and on which side: what that means, then which.

    Args:
        frame: `grid.grid_frame`.
        quantity: One of its columns.
        words: Which part that is, such as "at low noise".
    """
    routings, optimisations = grid_axes(frame)
    plain, usual = base_choice(routings, PLAIN), base_choice(optimisations, UNIFORM)
    effects = effect_intervals(seed_effects(frame, quantity))
    tested = effects[effects["p_value"].notna()]
    if tested.empty:
        return [_untested(f"final validation loss {words}")]
    rate = f"at a false discovery rate of {100 * FALSE_DISCOVERY_RATE:.0f} % over {len(tested)} comparisons"
    seeds = int(tested["seeds"].min())
    if not tested["significant"].any():
        return [f"No difference {words} is significant {rate}, with {seeds} seeds."]
    against: dict[Effect, str] = {"routing": plain, "optimisation": usual, "interaction": usual}
    parts = []
    for effect, base in against.items():
        for routing in reversed(routings):  # as in `grid_sentences`
            own = _sides(effects, effect, routing)
            sides = {"lower": own.lower, "higher": own.higher}
            found = [f"{_listed(choices)} {side}" for side, choices in sides.items() if len(choices)]
            parts += [f"{_compared(effect, routing, base, plain)}: {', '.join(found)}."] * bool(found)
    hint = f" ({seeds} seeds: a hint)" * (seeds < FIRM)
    rest = "all others are open" if not tested["significant"].all() else "none is open"
    return [f"Significant {words}, {rate}{hint}; {rest}:", *parts]


def grid_warnings(frame: pd.DataFrame) -> list[str]:
    """What a reader must know about the seeds before believing a grid."""
    counts = frame.groupby([ROUTING, OPTIMISATION], observed=True)["seed"].nunique()
    return [text for text in [seed_warning(int(counts.min()), of=int(counts.max()))] if text]


def _diverged_sentence(frame: pd.DataFrame, quantity: str) -> str:
    cells = grid_cells(frame, quantity)
    rows = cells[cells["diverged"] > 0].iterrows()
    names = [f"{_cell(row)} ({row['diverged']} of {row['seeds']} seeds)" for _, row in rows]
    return f"Diverged, and without a mean or a difference: {', '.join(names)}." if names else ""


def _terms_sentence(effects: pd.DataFrame, words: str) -> str:
    """What the others are about, and when they call a difference resolved."""
    tested = effects[effects["p_value"].notna()]
    if tested.empty:
        return _untested(words)
    seeds = int(tested["seeds"].min())
    text = (
        f"All of this is about the {words}, differences paired by seed. Lower and higher are said of what is resolved, "
        f"at a false discovery rate of {100 * FALSE_DISCOVERY_RATE:.0f} % over {len(tested)} comparisons"
    )
    if not tested["significant"].any():
        return f"{text}: none is, with {seeds} seeds."
    return f"{text}{f'; with {seeds} seeds take it as a hint' * (seeds < FIRM)}."


def _untested(words: str) -> str:
    return f"No two cells have two seeds in common: nothing can be said about how their {words} differs."


def _average_sentence(by_seed: pd.DataFrame, routing: str, plain: str) -> str:
    """The effect of a routing averaged over all optimisations: what the grid tells best."""
    average = _averaged(by_seed, "routing", routing)
    if average.over < 2 or average.interval.count < 2:
        return ""
    return (
        f"Averaged over {average.over} optimisations{average.without}, {_name(routing)} minus {_name(plain)} is "
        f"{_span(average.interval)}{_certainty(average.interval)}."
    )


class _Average(NamedTuple):
    """Mean of an effect over optimisations, over how many of them, and in words those that it is without."""

    interval: Interval
    over: int
    without: str


def _averaged(by_seed: pd.DataFrame, effect: Effect, routing: str) -> _Average:
    """One value per seed that all optimisations have; one under which a run diverged is left out, and named."""
    own = by_seed[(by_seed["effect"] == effect) & (by_seed[ROUTING] == routing)]
    diverged = set(own.loc[~np.isfinite(own["value"].astype(float)), OPTIMISATION])
    kept = own[~own[OPTIMISATION].isin(diverged)]
    table = kept.pivot(index="seed", columns=OPTIMISATION, values="value").dropna()
    names = ", ".join(_name(str(each)) for each in own[OPTIMISATION].unique() if each in diverged)
    without = f" (without {names}, where runs diverged)" if names else ""
    return _Average(mean_interval(table.mean(axis=1).to_numpy(dtype=float)), table.shape[1], without)


def _sides_sentence(effects: pd.DataFrame, effect: Effect, routing: str, against: str) -> str:
    """In how many cells of a routing something lowers or raises the quantity, and in how many that is open."""
    own = _sides(effects, effect, routing)
    if own.tested.empty:
        return ""
    what = _compared(effect, routing, against)
    return f"{what}: {_listed(own.lower)} lower, {_listed(own.higher)} higher, {own.open} of {len(own.tested)} open."


class _Sides(NamedTuple):
    """The effects of one kind and routing that were tested, and the optimisations that are resolved on each side."""

    tested: pd.DataFrame
    lower: pd.Series
    higher: pd.Series

    @property
    def open(self) -> int:
        return len(self.tested) - len(self.lower) - len(self.higher)


def _sides(effects: pd.DataFrame, effect: Effect, routing: str) -> _Sides:
    own = effects[(effects["effect"] == effect) & (effects[ROUTING] == routing)]
    tested = own[own["p_value"].notna()]
    found = tested[tested["significant"]]
    return _Sides(tested, *(found[side][OPTIMISATION] for side in (found["estimate"] < 0, found["estimate"] > 0)))


def _compared(effect: Effect, routing: str, against: str, plain: str = PLAIN) -> str:
    """What is compared with what, at the start of a sentence."""
    if effect == "optimisation":
        return f"Optimisations against {_name(against)}, under {_name(routing)}"
    if effect == "routing":
        return f"{_name(routing)} against {_name(against)}"
    return f"{_name(routing)} minus {_name(plain)}, against the same with {_name(against)}"


def _interaction_sentence(effects: pd.DataFrame, by_seed: pd.DataFrame, routing: str, plain: str, usual: str) -> str:
    """Whether a routing changes as much with an optimisation as without."""
    own = _sides(effects, "interaction", routing)
    tested = own.tested
    if tested.empty:
        return ""
    alone = by_seed[(by_seed["effect"] == "routing") & (by_seed[ROUTING] == routing) & (by_seed[OPTIMISATION] == usual)]
    base = float(alone["value"].mean(skipna=False))
    text = (
        f"Do they add up? {_name(routing)} minus {_name(plain)} is {base:+.3g} with {_name(usual)}; with "
        f"{_others(len(tested))} it is lower than that in {_listed(own.lower)}, higher in {_listed(own.higher)}"
    )
    if own.open:
        widest = float((tested["high"] - tested["low"]).max() / 2)
        text += (
            f", and open in {own.open} (intervals of up to ±{widest:.2g}): there, neither that they "
            "add up nor that one replaces the other is shown"
        )
    average = _averaged(by_seed, "interaction", routing)
    if average.over > 1 and average.interval.count > 1:
        text += (
            f". On average over {average.over} of them{average.without} it moves by {_span(average.interval)}"
            f"{_certainty(average.interval)}"
        )
    return f"{text}."


def _together_sentence(effects: pd.DataFrame, routing: str, usual: str) -> str:
    """With which optimisations the two together end lower than either alone."""
    found = {}
    for effect in ("routing", "optimisation"):
        own = effects[(effects["effect"] == effect) & (effects[ROUTING] == routing) & (effects[OPTIMISATION] != usual)]
        found[effect] = own.set_index(OPTIMISATION)
    both = found["routing"].index.intersection(found["optimisation"].index, sort=False)
    tested = [each for each in both if all(np.isfinite(table.loc[each, "p_value"]) for table in found.values())]
    if not tested:
        return ""
    better = [
        each
        for each in tested
        if all(table.loc[each, "significant"] and table.loc[each, "estimate"] < 0 for table in found.values())
    ]
    return (
        f"{_name(routing)} together with an optimisation ends lower than either of the two alone in {_listed(better)} "
        f"of {len(tested)}."
    )


def _lowest_sentence(frame: pd.DataFrame, quantity: str, plain: str, usual: str) -> str:
    cells = grid_cells(frame, quantity)
    measured = cells[np.isfinite(cells["mean"])]
    if len(measured) < 2:
        return ""
    best = measured.loc[measured["mean"].idxmin()]
    text = f"The lowest mean of {len(measured)} cells is that of {_cell(best)}: {best['mean']:.4g}"
    by_seed = frame.groupby([ROUTING, OPTIMISATION, "seed"], observed=True)[quantity].mean().unstack("seed")
    start, lowest = (plain, usual), (best[ROUTING], best[OPTIMISATION])
    if start in by_seed.index and lowest != start:
        interval = mean_interval((by_seed.loc[lowest] - by_seed.loc[start]).dropna().to_numpy())
        if np.isfinite(interval.low):
            text += f", {_span(interval)} against {_name(plain)} with {_name(usual)}"
    return f"{text}. Picked as the lowest of so many, it looks better than it is: expect less of it with other seeds."


def _others(count: int) -> str:
    return "one other optimisation" if count == 1 else f"{count} other optimisations"


def _listed(choices: Sequence[str] | pd.Series) -> str:
    """How many, and their names."""
    return f"{len(choices)} ({', '.join(_name(str(each)) for each in choices)})" if len(choices) else "none"


def _span(interval: Interval) -> str:
    return f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


def _certainty(interval: Interval) -> str:
    if not interval.excludes_zero:
        return ", which the seeds cannot tell from no difference"
    if interval.count < ENOUGH_TO_CLAIM:
        return ", a hint from too few seeds to claim it"
    return _hint(interval.count)


def _hint(seeds: int) -> str:
    return "" if seeds >= FIRM else f"; {seeds} seeds make that a hint"


def _cell(row: pd.Series) -> str:
    return f"{_name(row[ROUTING])} with {_name(row[OPTIMISATION])}"


def _name(choice: str) -> str:
    return method_name(choice)
