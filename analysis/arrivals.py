"""When a curve comes down to a threshold, of runs that may never do: such a run is censored at its end, not dropped."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from analysis.axes import AXES, Axis, seed_curves
from analysis.methods import ordered
from analysis.uncertainty import FloatArray, proportion_interval


@dataclasses.dataclass(frozen=True)
class Arrival:
    """When a curve first came down to a threshold.

    Attributes:
        step: Steps (or samples, seconds, operations) until it arrived; if it never did, the last one seen (the run is
            *censored* there).
        arrived: Whether it arrived.
    """

    step: float
    arrived: bool


def steps_to_threshold(steps: npt.NDArray[Any], values: FloatArray, threshold: float) -> Arrival:
    """First position at which a curve is at or below a threshold, interpolated linearly between measurements.

    A curve that is below at its first measurement arrives there, which is later than it truly did.

    Args:
        steps: (N,) increasing positions on any axis.
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


def arrivals(
    curves: pd.DataFrame, metric: str, thresholds: Mapping[Any, float] | float, axis: Axis = "step"
) -> pd.DataFrame:
    """Cost of reaching a threshold for every method and seed.

    Args:
        curves: Tidy frame.
        metric: Its metric to look at; lower is better.
        thresholds: One value, fixed before looking, or one per seed (then other seeds are left out).
        axis: What the cost is measured in.

    Returns:
        Columns method, seed, threshold, the axis, arrived; see `steps_to_threshold`.
    """
    rows = []
    for (method, seed), curve in seed_curves(curves, metric, axis).items():
        threshold = thresholds.get(seed) if isinstance(thresholds, Mapping) else thresholds
        if threshold is not None:
            found = steps_to_threshold(curve.x, curve.value, threshold)
            rows.append((method, seed, threshold, found.step, found.arrived))
    return pd.DataFrame(rows, columns=["method", "seed", "threshold", axis, "arrived"])


def steps_to_baseline(
    curves: pd.DataFrame, metric: str, baseline: str = "baseline", axis: Axis = "step", *, share: float = 1.0
) -> pd.DataFrame:
    """Cost until each run reaches the final value of the baseline run *with the same seed*: see `arrivals`.

    Args:
        curves: Tidy frame.
        metric: Its metric to look at; lower is better.
        baseline: Whose value the threshold is.
        axis: What the cost is measured in.
        share: At what share of the baseline's training its value is taken; below 1, fewer runs fail to arrive.
    """
    found = seed_curves(curves, metric, axis)
    thresholds = {
        seed: float(np.interp(share * curve.x[-1], *curve))
        for (method, seed), curve in found.items()
        if method == baseline
    }
    return arrivals(curves, metric, thresholds, axis)


def arrival_axis(reached: pd.DataFrame) -> Axis:
    """The axis that a result of `arrivals` is on."""
    return next(axis for axis in AXES if axis in reached)


def arrival_profile(reached: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Fraction of a method's runs that have arrived by each position, right if some were not followed to the end.

    Kaplan and Meier's estimate (Journal of the American Statistical Association 53, 1958) by `scipy.stats.ecdf`, with
    log-log intervals from Greenwood's variance. Where these are undefined, because nobody has arrived yet or everybody
    has, the exact binomial one of those that are followed, or have arrived, stands in.

    Args:
        reached: Result of `arrivals`.
        level: Confidence level, at each position by itself.

    Returns:
        Columns method, the axis, fraction, low, high, followed (runs that had neither arrived nor ended before), ended
        (runs that end there without having arrived); one row for position 0 and for each at which a run arrives or
        ends; between them nothing changes.
    """
    axis = arrival_axis(reached)
    pieces = []
    for method in ordered(reached["method"]):
        own = reached[reached["method"] == method]
        profile = _profile(own[axis].to_numpy(dtype=float), own["arrived"].to_numpy(dtype=bool), level)
        pieces.append(profile.rename(columns={"at": axis}).assign(method=method))
    columns = ["method", axis, "fraction", "low", "high", "followed", "ended"]
    return pd.concat(pieces, ignore_index=True)[columns] if pieces else pd.DataFrame(columns=columns)


def _profile(times: FloatArray, arrived: npt.NDArray[np.bool_], level: float) -> pd.DataFrame:
    found = stats.ecdf(stats.CensoredData(uncensored=times[arrived], right=times[~arrived])).cdf
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The confidence interval is undefined", RuntimeWarning)
        interval = found.confidence_interval(level, method="log-log")
    table = pd.DataFrame(
        {
            "at": np.concatenate([[0.0], found.quantiles]),
            "fraction": np.concatenate([[0.0], found.probabilities]),
            "low": np.concatenate([[np.nan], interval.low.probabilities]),
            "high": np.concatenate([[np.nan], interval.high.probabilities]),
        }
    )
    table["followed"] = [int((times >= at).sum()) for at in table["at"]]
    table["ended"] = [int((times[~arrived] == at).sum()) for at in table["at"]]
    for row in np.flatnonzero(table["low"].isna()):
        everybody = table["fraction"][row] == 1
        count = int(arrived.sum()) if everybody else int(table["followed"][row])
        exact = proportion_interval(count if everybody else 0, count, level)
        table.loc[row, ["low", "high"]] = exact.low, exact.high
    return table


def median_arrivals(reached: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Median cost of reaching the threshold over all runs, those that never arrived included.

    Args:
        reached: Result of `arrivals`.
        level: Confidence level.

    Returns:
        Index method; columns median (where `arrival_profile` reaches one half; infinite if it does not), low, high (the
        positions at which its interval holds one half: Brookmeyer and Crowley, Biometrics 38, 1982), arrived and runs.
    """
    axis = arrival_axis(reached)
    rows = {}
    for method, profile in arrival_profile(reached, level).groupby("method", sort=False):
        at = profile[axis].to_numpy()
        ends = [_first_half(at, profile[name].to_numpy()) for name in ("fraction", "high", "low")]
        own = reached.loc[reached["method"] == method, "arrived"]
        rows[method] = [*ends, int(own.sum()), len(own)]
    columns = ["median", "low", "high", "arrived", "runs"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("method")


def _first_half(at: FloatArray, fraction: FloatArray) -> float:
    """Where a rising step function passes one half; the middle of the step if it stays there, as a median does."""
    reached = np.flatnonzero((fraction > 0.5) | np.isclose(fraction, 0.5))
    if not reached.size:
        return np.inf
    first = reached[0]
    if not np.isclose(fraction[first], 0.5):
        return float(at[first])
    above = np.flatnonzero(fraction > fraction[first] + 1e-9)
    return float((at[first] + at[above[0]]) / 2) if above.size else np.inf
