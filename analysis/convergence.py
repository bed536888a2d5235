"""Does a method converge faster, or does it only look so? Aligned curves, steps to a threshold, speed-up.

Curves come as the tidy frame of `frames.curves_frame`: columns run, method, seed, step, metric, value. Runs of two
methods with the same seed share initialisation and data order, so comparisons are paired by seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.uncertainty import Interval, mean_interval


@dataclasses.dataclass(frozen=True)
class Arrival:
    """When a curve first came down to a threshold.

    Attributes:
        step: Steps until it arrived; if it never did, the last step seen (the run is *censored* there).
        arrived: Whether it arrived.
    """

    step: float
    arrived: bool


def steps_to_threshold(steps: npt.NDArray[np.int64], values: npt.NDArray[np.float64], threshold: float) -> Arrival:
    """First step at which a curve is at or below a threshold, interpolated linearly between measurements.

    Args:
        steps: (N,) increasing.
        values: (N,); NaN (a diverged run) counts as above.
        threshold: The value to reach.

    Raises:
        ValueError: If the curve is empty.
    """
    if len(steps) == 0:
        raise ValueError("an empty curve has no steps to a threshold")
    below = np.flatnonzero(values <= threshold)
    if below.size == 0:
        return Arrival(float(steps[-1]), False)
    at = int(below[0])
    if at == 0 or not np.isfinite(values[at - 1]):
        return Arrival(float(steps[at]), True)
    share = (values[at - 1] - threshold) / (values[at - 1] - values[at])
    return Arrival(float(steps[at - 1] + share * (steps[at] - steps[at - 1])), True)


def aligned_curves(curves: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric of all runs on one axis of steps, for example for bands over seeds.

    Returns:
        Index step, columns (method, seed): the value, interpolated linearly between a run's own measurements and NaN
        beyond them; the mean where a method has several runs with one seed.
    """
    chosen = curves[curves["metric"] == metric]
    wide = chosen.pivot_table(index="step", columns=["method", "seed"], values="value", aggfunc="mean")
    return wide.interpolate(method="index", limit_area="inside")


def mean_curves(aligned: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of `aligned_curves`, per method, where all seeds have a value (else the mean would jump)."""
    methods = list(dict.fromkeys(aligned.columns.get_level_values("method")))
    return pd.DataFrame({method: aligned[method].mean(axis=1, skipna=False) for method in methods})


def arrivals(curves: pd.DataFrame, metric: str, thresholds: Mapping[Any, float] | float) -> pd.DataFrame:
    """Steps to a threshold for every method and seed.

    Args:
        curves: Tidy frame.
        metric: Its metric to look at; lower is better.
        thresholds: One value, fixed before looking, or one per seed (then other seeds are left out).

    Returns:
        Columns method, seed, threshold, step, arrived.
    """
    chosen = curves[curves["metric"] == metric]
    rows = []
    for (method, seed), own in chosen.groupby(["method", "seed"]):
        threshold = thresholds.get(seed) if isinstance(thresholds, Mapping) else thresholds
        if threshold is None:
            continue
        curve = own.groupby("step")["value"].mean()
        found = steps_to_threshold(curve.index.to_numpy(), curve.to_numpy(), threshold)
        rows.append((method, seed, threshold, found.step, found.arrived))
    return pd.DataFrame(rows, columns=["method", "seed", "threshold", "step", "arrived"])


def final_values(curves: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Last measured value of every method and seed: columns method, seed, step, value (mean over equal seeds)."""
    chosen = curves[curves["metric"] == metric].sort_values("step")
    last = chosen.groupby("run").tail(1)  # not last(), which would pass over the NaN of a diverged run
    return last.groupby(["method", "seed"], as_index=False)[["step", "value"]].mean()


def steps_to_baseline(curves: pd.DataFrame, metric: str, baseline: str = "baseline") -> pd.DataFrame:
    """Steps until each run reaches the final loss of the baseline run *with the same seed*: see `arrivals`."""
    final = final_values(curves, metric)
    own = final[final["method"] == baseline]
    return arrivals(curves, metric, dict(zip(own["seed"], own["value"], strict=True)))


def paired_difference(
    curves: pd.DataFrame, metric: str, method: str, baseline: str = "baseline", level: float = 0.95
) -> tuple[pd.Series, Interval]:
    """Final value of a method minus the baseline's, seed by seed, and the t-interval of its mean.

    Returns:
        Differences indexed by the seeds that both have (negative: the method is better), and the interval. A diverged
        run (NaN) stays among them and makes the mean NaN: leaving it out would flatter its method.
    """
    final = final_values(curves, metric)
    own = final[final["method"] == method].set_index("seed")["value"]
    other = final[final["method"] == baseline].set_index("seed")["value"]
    shared = own.index.intersection(other.index).sort_values()
    difference = own[shared] - other[shared]
    return difference, mean_interval(difference.to_numpy(), level)


def speed_up(
    reached: pd.DataFrame, method: str, baseline: str = "baseline", level: float = 0.95
) -> tuple[pd.Series, Interval]:
    """How many times fewer steps a method needs, paired by seed: steps of the baseline / steps of the method.

    Args:
        reached: Result of `arrivals`.
        method: The method in question.
        baseline: What it is compared with.
        level: Confidence level.

    Returns:
        The ratio per seed, and its geometric mean with a t-interval on the logarithm. A method that never arrived is
        censored: its ratio is an upper bound, so with any such seed estimate and interval are NaN, not a guess.
    """
    steps = reached.pivot(index="seed", columns="method", values="step").reindex(columns=[method, baseline])
    arrived = reached.pivot(index="seed", columns="method", values="arrived").reindex(columns=[method, baseline])
    ratio = (steps[baseline] / steps[method]).dropna()
    if not arrived.loc[ratio.index].all(axis=None):
        return ratio, Interval(np.nan, np.nan, np.nan, level, len(ratio))
    logs = mean_interval(np.log(ratio.to_numpy(dtype=float)), level)
    estimate, low, high = (float(np.exp(value)) for value in (logs.estimate, logs.low, logs.high))
    return ratio, Interval(estimate, low, high, level, len(ratio))
