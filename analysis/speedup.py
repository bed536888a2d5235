"""How many times cheaper a method gets to where the baseline is, and what can be said if some runs never get there."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pandas as pd

from analysis.arrivals import Arrival, arrival_axis, steps_to_threshold
from analysis.axes import Axis, Curve, paired_curves, seed_curves
from analysis.uncertainty import FEW_SEEDS, Interval, geometric_mean_interval, resampled_runs

_OPEN = 1e3
"""Logarithm that stands for an infinite one."""

Pairs = dict[int, tuple[Arrival, Arrival]]
"""Arrivals of the method and of the baseline, by seed."""


@dataclasses.dataclass(frozen=True)
class SpeedUp:
    """Cost of the baseline / cost of the method, paired by seed; above 1 the method is faster.

    A method that never arrived bounds its ratio from above, a baseline that never arrived from below; if neither did,
    nothing is known. Bounds of a mean or median follow from those of the ratios. They hold for these seeds; they are no
    confidence interval.

    Attributes:
        ratios: Index seed, columns low and high: bounds of the ratio, equal where both runs arrived.
        interval: Geometric mean with the interval of the mean logarithm (`uncertainty.mean_interval`); NaN as soon as
            any ratio is only bounded.
        mean_bounds: Of the geometric mean.
        median_bounds: Of the median (of logarithms, if it falls between two).
    """

    ratios: pd.DataFrame
    interval: Interval
    mean_bounds: tuple[float, float]
    median_bounds: tuple[float, float]

    @property
    def median(self) -> float:
        """The median ratio if the uncensored ones determine it, else NaN."""
        low, high = self.median_bounds
        return low if np.isclose(low, high) else np.nan

    @functools.cached_property
    def median_interval(self) -> tuple[float, float]:
        """From `uncertainty.FEW_SEEDS` seeds on, percentiles of the medians of resampled seeds (whole runs).

        Of their lower bounds below, of their upper bounds above, so runs that never arrived do not spoil it. NaN for
        fewer seeds.
        """
        if len(self.ratios) < FEW_SEEDS:
            return np.nan, np.nan
        # The middle of an open and a known end must be computable; what comes of an open end is open again afterwards.
        with np.errstate(divide="ignore"):
            logs = np.log(self.ratios[["low", "high"]].to_numpy()).clip(-_OPEN, _OPEN)
        level = self.interval.level
        draws = np.median(logs[resampled_runs(len(logs))], axis=1)
        # Medians that were drawn, not points between them: one of two neighbours may be open.
        low = np.quantile(draws[:, 0], (1 - level) / 2, method="lower")
        high = np.quantile(draws[:, 1], (1 + level) / 2, method="higher")
        return 0.0 if low < -_OPEN / 4 else float(np.exp(low)), np.inf if high > _OPEN / 4 else float(np.exp(high))


def speed_up(reached: pd.DataFrame, method: str, baseline: str = "baseline", level: float = 0.95) -> SpeedUp:
    """How many times less a method needs, paired by seed, with bounds in place of what runs that never arrived hide.

    Args:
        reached: Result of `arrivals.arrivals`, on any axis.
        method: The method in question.
        baseline: What it is compared with.
        level: Confidence level.

    Returns:
        A pair in which a run has arrived at position 0 already, where no ratio exists, is left open from 0 to infinity.
    """
    return _compared(_pairs(reached, method, baseline), level)


def _pairs(reached: pd.DataFrame, method: str, baseline: str) -> Pairs:
    axis = arrival_axis(reached)
    by_method = {
        name: {
            int(seed): Arrival(float(at), bool(arrived))
            for seed, at, arrived in zip(own["seed"], own[axis], own["arrived"], strict=True)
        }
        for name, own in reached.groupby("method")
    }
    own, other = by_method.get(method, {}), by_method.get(baseline, {})
    return {seed: (own[seed], other[seed]) for seed in sorted(own.keys() & other.keys())}


def _compared(pairs: Pairs, level: float) -> SpeedUp:
    bounds = [_bounds(own, other) for own, other in pairs.values()]
    seeds = pd.Index(list(pairs), name="seed")
    ratios = pd.DataFrame(bounds, columns=["low", "high"], index=seeds, dtype=float)
    determined = ratios["low"] == ratios["high"]
    if determined.all():
        interval = geometric_mean_interval(ratios["low"].to_numpy(), level)
    else:
        interval = Interval(np.nan, np.nan, np.nan, level, len(ratios))
    with np.errstate(divide="ignore"):
        logs = ratios.transform(np.log)
    mean, median = np.exp(logs.mean()), np.exp(logs.median())
    return SpeedUp(ratios, interval, (mean["low"], mean["high"]), (median["low"], median["high"]))


def _bounds(own: Arrival, other: Arrival) -> tuple[float, float]:
    if any(arrival.arrived and arrival.step <= 0 for arrival in (own, other)):
        return 0.0, np.inf
    return _ratio(own, other) if own.arrived else 0.0, _ratio(own, other) if other.arrived else np.inf


def _ratio(own: Arrival, other: Arrival) -> float:
    return other.step / own.step if own.step > 0 else np.inf  # a run that was followed no further than position 0


def speed_up_curve(
    curves: pd.DataFrame,
    metric: str,
    method: str,
    baseline: str = "baseline",
    level: float = 0.95,
    axis: Axis = "step",
    *,
    points: int = 20,
) -> pd.DataFrame:
    """Speed-up to each of a range of thresholds, which the baseline alone fixes: is the method ahead only early on?

    The thresholds are the values that the baseline has, seed by seed, at evenly spaced positions up to its end, where
    it is at its final value. They begin where both methods are followed: no threshold lies above a first measurement.

    Args:
        curves: Tidy frame.
        metric: One of its metrics; lower is better.
        method: The method in question.
        baseline: What it is compared with.
        level: Confidence level, at each threshold by itself.
        axis: What the cost is measured in.
        points: Number of thresholds.

    Returns:
        Columns method, the axis (position of the baseline), threshold (mean over seeds); estimate, low, high (geometric
        mean and its interval; NaN with a run that never arrived), at_least, at_most (bounds of the mean), median (NaN
        if not determined); arrived and pairs. Empty without a common seed, or if the method starts below where the
        baseline ends.
    """
    curves_of_seeds = paired_curves(seed_curves(curves, metric, axis), method, baseline)
    rows = []
    for position in _positions(list(curves_of_seeds.values()), points):
        pairs, thresholds = {}, []
        for seed, (own, other) in curves_of_seeds.items():
            thresholds.append(threshold := float(np.interp(position, *other)))
            pairs[seed] = steps_to_threshold(*own, threshold), steps_to_threshold(*other, threshold)
        speed = _compared(pairs, level)
        arrived = sum(own.arrived for own, _ in pairs.values())
        interval = (speed.interval.estimate, speed.interval.low, speed.interval.high)
        mean = float(np.mean(thresholds))
        rows.append((method, position, mean, *interval, *speed.mean_bounds, speed.median, arrived, len(pairs)))
    numbers = ["threshold", "estimate", "low", "high", "at_least", "at_most", "median", "arrived", "pairs"]
    return pd.DataFrame(rows, columns=["method", axis, *numbers])


def _positions(pairs: list[tuple[Curve, Curve]], points: int) -> list[float]:
    """Positions of the baseline, from where it is below the first measurement of the method in every seed."""
    if not pairs:
        return []
    begun = [steps_to_threshold(*other, own.value[0]) for own, other in pairs]
    start = max([arrival.step for arrival in begun] + [other.x[0] for _, other in pairs])
    end = min(other.x[-1] for _, other in pairs)
    if not all(arrival.arrived for arrival in begun) or start >= end:
        return []
    return np.linspace(start, end, points).tolist()
