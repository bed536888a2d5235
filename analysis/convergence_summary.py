"""How a method converges against the reference, in sentences that claim no more than the seeds can carry."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from analysis.axes import Axis, known_axes
from analysis.convergence import (
    area_difference,
    paired_difference,
    probability_of_improvement,
    speed_up,
    steps_to_baseline,
)
from analysis.frames import HIGH_NOISE, LOW_NOISE, VAL_LOSS
from analysis.interval_convergence import interval_convergence
from analysis.methods import method_name
from analysis.significance import FALSE_DISCOVERY_RATE
from analysis.uncertainty import ENOUGH_TO_CLAIM, FEW_SEEDS, Interval

EARLIER_SHARE = 0.75
"""Where a final loss is not reached by all runs, the baseline's loss at this share of its training mostly is."""
_EARLIER_WORDS = "after three quarters of its training"
AXIS_WORDS: dict[Axis, str] = {
    "step": "steps",
    "samples": "samples seen",
    "seconds": "training time",
    "flops": "floating-point operations",
}
_UNEVEN_CLOCKS = 1.25
_LISTED = 4


def convergence_sentences(curves: pd.DataFrame, reference: str, others: list[str]) -> list[str]:
    """Who ends lower, who is faster, who is ahead on average, at which noise levels, and whether that holds in time.

    Args:
        curves: `frames.curves_frame` of what was compared.
        reference: The method that the others are compared with.
        others: Those, in the order of the sentences.
    """
    sentences = [_loss_sentence(curves, method, reference) for method in others]
    sentences += [_speed_sentence(curves, method, reference) for method in others]
    sentences += [_area_sentence(curves, method, reference) for method in others]
    sentences += [_parts_sentence(curves, method, reference) for method in others]
    table = interval_convergence(curves, reference)
    sentences += [_interval_sentence(table, method, reference) for method in others]
    sentences += [
        _axes_sentence(curves, first, second) for first, second in itertools.combinations([*others, reference], 2)
    ]
    return [sentence for sentence in sentences if sentence]


def clock_warning(curves: pd.DataFrame) -> str | None:
    """A warning if equal runs took unequally long, so that comparisons at equal time compare the machines, too."""
    validated = curves[curves["metric"] == VAL_LOSS]
    if validated.empty or "seconds" not in known_axes(validated):
        return None
    last = validated.dropna(subset="seconds").sort_values("step").groupby("run").tail(1)
    per_step = (last["seconds"] / last["step"]).groupby(last["method"])
    spread = float((per_step.max() / per_step.min()).max())
    if spread <= _UNEVEN_CLOCKS:
        return None
    return (
        f"Runs of one method differ by a factor of up to {spread:.1f} in their time per step: the machine was not "
        "theirs alone, and comparisons at equal time are no better than that."
    )


def _loss_sentence(curves: pd.DataFrame, method: str, reference: str) -> str:
    said = _loss_words(curves, method, reference)
    own = curves[(curves["metric"] == VAL_LOSS) & curves["method"].isin([method, reference])]
    ends = own.groupby(["seed", "method"])["step"].max().unstack().dropna()
    equal = ends.empty or ends.shape[1] < 2 or bool((ends[method] == ends[reference]).all())
    return said if equal else f"Compared where the shorter run of each seed stops: {said}"


def _loss_words(curves: pd.DataFrame, method: str, reference: str) -> str:
    difference, interval = paired_difference(curves, VAL_LOSS, method, reference)
    name, base = method_name(method), method_name(reference)
    if not interval.count:
        return f"{name} and {base} have no finished run with the same seed, so they are not compared."
    if difference.isna().any():
        return (
            f"{name} or {base} diverged in {difference.isna().sum()} of {interval.count} seeds: see the table of runs."
        )
    amount, direction = _amount(curves, interval, reference), _side(interval)
    if interval.count == 1:
        return f"{name} ends {amount} {direction} than {base} in the one seed they share; one pair is no evidence."
    span = f"95 % paired interval [{interval.low:+.3g}, {interval.high:+.3g}], {_seeds_listed(difference)}"
    chance = f" {_chance_words(curves, method, reference)}"
    if interval.excludes_zero:
        hint = "" if interval.count >= ENOUGH_TO_CLAIM else ", a hint from too few seeds to claim it"
        return f"{name} ends {direction} than {base}, by {amount} in final validation loss ({span}){hint}.{chance}"
    if (np.sign(difference) == np.sign(interval.estimate)).all():
        return (
            f"{name} ends {direction} than {base} in each of {interval.count} seeds, by {amount} in the mean final "
            f"validation loss, but these are too few to exclude that they are level ({span}).{chance}"
        )
    return (
        f"{name} and {base} end level as far as these seeds can tell: the mean difference in final validation loss is "
        f"{amount} {direction}, but its interval includes zero ({span}).{chance}"
    )


def _seeds_listed(difference: pd.Series) -> str:
    """How many, and every one while they are few."""
    count = f"{len(difference)} seeds"
    return count if len(difference) >= FEW_SEEDS else f"{count}: {', '.join(f'{value:+.3g}' for value in difference)}"


def _amount(curves: pd.DataFrame, interval: Interval, reference: str) -> str:
    level = curves[(curves["metric"] == VAL_LOSS) & (curves["method"] == reference)].sort_values("step")
    relative = interval.estimate / level.groupby("run")["value"].last().mean()
    return f"{abs(interval.estimate):.3g} ({abs(relative):.1%})"


def _side(interval: Interval) -> str:
    return "lower" if interval.estimate < 0 else "higher"


def _chance_words(curves: pd.DataFrame, method: str, reference: str) -> str:
    chance = probability_of_improvement(curves, VAL_LOSS, method, reference)
    wins = f"{chance.estimate * chance.count:g} of {chance.count} seeds"
    text = (
        f"It is lower in {wins}: probability of improvement {chance.estimate:.2f} [{chance.low:.2f}, {chance.high:.2f}]"
    )
    return f"{text}." if chance.excludes(0.5) else f"{text}, which this count alone cannot tell from one half."


def _speed_sentence(curves: pd.DataFrame, method: str, reference: str) -> str:
    speed = speed_up(steps_to_baseline(curves, VAL_LOSS, reference), method, reference)
    if speed.ratios.empty:
        return ""
    name, base = method_name(method), method_name(reference)
    arrived = speed.ratios[speed.ratios["low"] > 0]
    pairs = len(speed.ratios)
    listed = ", ".join(f"{value:.2f}" for value in arrived["low"]) if pairs < FEW_SEEDS else str(pairs)
    text = f"{name} reached the final loss of {base}"
    if len(arrived) < pairs:
        text += f" in {len(arrived)} of {pairs} seeds within its training"
        if len(arrived) and pairs < FEW_SEEDS:
            text += f", {listed} times as fast there"
        if not np.isnan(speed.median):
            text += f"; the median over all of them is {speed.median:.2f}x"
        low, high = speed.median_interval
        if not np.isnan(low) and (low > 0 or np.isfinite(high)):
            text += f" (95 % interval of the median [{low:.2f}, {high:.2f}])"
        return f"{text}. {_earlier_words(curves, method, reference)}".strip()
    if pairs == 1:
        return f"{text} in {1 / speed.ratios['low'].iloc[0]:.0%} of the steps, in one seed."
    span = f"95 % interval [{speed.interval.low:.2f}, {speed.interval.high:.2f}]; seeds: {listed}"
    return f"{text} {speed.interval.estimate:.2f}x as fast ({span}){_certainty(speed.interval)}."


def _earlier_words(curves: pd.DataFrame, method: str, reference: str) -> str:
    """The speed-up to a threshold that comes earlier in training."""
    speed = speed_up(steps_to_baseline(curves, VAL_LOSS, reference, share=EARLIER_SHARE), method, reference)
    low, high = speed.mean_bounds
    text = f"To the loss that {method_name(reference)} has {_EARLIER_WORDS} it is"
    if not np.isnan(speed.interval.low):
        span = f"95 % interval [{speed.interval.low:.2f}, {speed.interval.high:.2f}]"
        return f"{text} {speed.interval.estimate:.2f}x as fast ({span}){_certainty(speed.interval)}."
    if np.isfinite(high) and low < high:
        return f"{text} at most {high:.2f}x as fast, in the mean of these seeds."
    return ""


def _certainty(interval: Interval) -> str:
    if not interval.excludes(1.0):
        return ", which the seeds cannot tell from 1"
    return "" if interval.count >= ENOUGH_TO_CLAIM else ", a hint from too few seeds to claim it"


def _area_sentence(curves: pd.DataFrame, method: str, reference: str) -> str:
    _, interval = area_difference(curves, VAL_LOSS, method, reference)
    if not np.isfinite(interval.low):
        return ""
    return (
        f"Averaged over training, as far as both were measured, the loss of {method_name(method)} is "
        f"{abs(interval.estimate):.3g} {_side(interval)} than that of {method_name(reference)} "
        f"[{interval.low:+.3g}, {interval.high:+.3g}]{_unresolved(interval)}."
    )


def _parts_sentence(curves: pd.DataFrame, method: str, reference: str) -> str:
    parts = []
    for metric, words in ((LOW_NOISE, "low noise"), (HIGH_NOISE, "high noise")):
        interval = paired_difference(curves, metric, method, reference)[1]
        if interval.count < 2 or not np.isfinite(interval.estimate):
            return ""
        parts.append(
            f"{interval.estimate:+.3g} at {words} [{interval.low:+.3g}, {interval.high:+.3g}]{_unresolved(interval)}"
        )
    return f"{method_name(method)} minus {method_name(reference)} by noise level: {'; '.join(parts)}."


def _interval_sentence(table: pd.DataFrame, method: str, reference: str) -> str:
    own = table[(table["method"] == method) & (table["pairs"] >= ENOUGH_TO_CLAIM)]
    tested = own[(own["quantity"] == "difference") & own["p_value"].notna()]
    if tested.empty:
        return ""
    found = tested[tested["significant"]]
    lower, higher = found[found["estimate"] < 0]["interval"], found[found["estimate"] > 0]["interval"]
    return (
        f"Of {len(tested)} timestep intervals {method_name(method)} ends lower than {method_name(reference)} in "
        f"{_intervals(lower)} and higher in {_intervals(higher)}; the others are not resolved (false discovery rate "
        f"{100 * FALSE_DISCOVERY_RATE:.0f} % over intervals)."
    )


def _intervals(labels: pd.Series) -> str:
    if not len(labels) or len(labels) > _LISTED:
        return str(len(labels))
    return f"{len(labels)} ({', '.join(labels)})"


def _axes_sentence(curves: pd.DataFrame, method: str, reference: str) -> str:
    """Says so if who is ahead at equal steps is not who is ahead at equal cost, and one of the two is resolved."""
    known = known_axes(curves[curves["metric"] == VAL_LOSS])
    found = {axis: paired_difference(curves, VAL_LOSS, method, reference, axis=axis)[1] for axis in known}
    at_steps = found.pop("step")
    turned = {
        axis: each
        for axis, each in found.items()
        if each.estimate * at_steps.estimate < 0 and (_is_resolved(at_steps) or _is_resolved(each))
    }
    if not turned:
        return ""
    name, base = method_name(method), method_name(reference)
    parts = [f"{_side(each)} at equal {AXIS_WORDS[axis]} ({_span(each)})" for axis, each in turned.items()]
    return (
        f"The ranking depends on what is held equal: {name} is {_side(at_steps)} than {base} at equal steps "
        f"({_span(at_steps)}), but {' and '.join(parts)}."
    )


def _span(interval: Interval) -> str:
    ends = f" [{interval.low:+.3g}, {interval.high:+.3g}]" if np.isfinite(interval.low) else ""
    return f"{interval.estimate:+.3g}{ends}{_unresolved(interval)}"


def _is_resolved(interval: Interval) -> bool:
    return interval.excludes_zero and interval.count >= ENOUGH_TO_CLAIM


def _unresolved(interval: Interval) -> str:
    """What to say behind an interval that claims nothing, and why where the interval does not show it."""
    if _is_resolved(interval):
        return ""
    return f", not resolved: {interval.count} seeds are too few" if interval.excludes_zero else ", not resolved"
