"""Where on the noise axis a method converges faster: every timestep interval compared, many comparisons at once."""

from __future__ import annotations

import re
from typing import Literal, get_args

import numpy as np
import pandas as pd
from scipy import stats

from analysis.arrivals import steps_to_baseline
from analysis.axes import Axis
from analysis.convergence import area_difference, paired_difference, paired_values, probability_of_improvement
from analysis.frames import VAL_LOSS
from analysis.methods import ordered
from analysis.significance import FALSE_DISCOVERY_RATE, q_values
from analysis.speedup import speed_up
from analysis.uncertainty import Interval, mean_p_value

Quantity = Literal["difference", "speed_up", "area_difference", "probability"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
NEUTRAL: dict[Quantity, float] = {"difference": 0.0, "speed_up": 1.0, "area_difference": 0.0, "probability": 0.5}
"""What each is if the method changes nothing."""

_INTERVAL_METRIC = re.compile(rf"{VAL_LOSS}_(t\d+-\d+)")


def interval_metrics(curves: pd.DataFrame) -> dict[str, str]:
    """Interval label -> its metric ``loss/val_<label>``, in the order of noise."""
    metrics = sorted(str(metric) for metric in curves["metric"].unique())
    return {match[1]: metric for metric in metrics if (match := _INTERVAL_METRIC.fullmatch(metric))}


def interval_convergence(
    curves: pd.DataFrame,
    baseline: str = "baseline",
    level: float = 0.95,
    axis: Axis = "step",
    *,
    share: float = 1.0,
) -> pd.DataFrame:
    """Compares every method with the baseline in the validation loss of every timestep interval, paired by seed.

    All intervals belong to the same runs, and with many of them some will differ by chance. So p-values are adjusted
    over the intervals, for each method and quantity (Benjamini and Hochberg, Journal of the Royal Statistical Society B
    57, 1995; valid also for the positive dependence between intervals). The confidence intervals are those of a single
    comparison, not adjusted.

    Args:
        curves: `frames.curves_frame`.
        baseline: What the others are compared with.
        level: Confidence level.
        axis: What cost is measured in.
        share: For the speed-up, at what share of the baseline's training its loss is the threshold; final at 1.

    Returns:
        A row per method, interval and quantity:

        - ``difference``: final loss less the baseline's (`convergence.paired_difference`), t-test.
        - ``speed_up``: cost of the baseline to its loss at ``share`` / the method's cost to the same loss
          (`speedup.speed_up`), t-test of logarithms.
        - ``area_difference``: mean of the curve less the baseline's (`convergence.area_difference`), t-test.
        - ``probability``: of ending lower than the baseline (`convergence.probability_of_improvement`), sign test.

        Columns method, task, interval, metric, quantity; estimate, low, high (NaN where censoring or a single pair
        leaves no interval), at_least, at_most (bounds of the mean speed-up; else the estimate), median (of the
        speed-up, where determined; else NaN), reference (mean of the baseline's final loss, the scale of both
        differences), pairs, arrived (for the speed-up, pairs whose method did), p_value, q_value, significant (q-value
        at most 5 %).
    """
    rows = []
    by_metric = dict(tuple(curves.groupby("metric")))
    methods = [method for method in ordered(curves["method"]) if method != baseline]
    for task, (label, metric) in enumerate(interval_metrics(curves).items()):
        for method in methods:
            pair = by_metric[metric][by_metric[metric]["method"].isin([method, baseline])]
            compared = _compare(pair, metric, method, baseline, level, axis, share)
            rows += [{"method": method, "task": task, "interval": label, "metric": metric, **row} for row in compared]
    table = pd.DataFrame(rows, columns=_COLUMNS)
    table["q_value"] = table.groupby(["method", "quantity"])["p_value"].transform(q_values)
    table["significant"] = table["q_value"] <= FALSE_DISCOVERY_RATE
    return table


def relative_differences(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `interval_convergence` with both differences in units of the baseline's mean final loss.

    Losses of intervals differ in size by orders of magnitude; so divided, they can be drawn on one axis. The unit is
    the same for all seeds of an interval, so that intervals and tests stay what they are.
    """
    scaled = table.copy()
    rows = scaled["quantity"].isin(["difference", "area_difference"])
    columns = ["estimate", "low", "high", "at_least", "at_most"]
    scaled.loc[rows, columns] = scaled.loc[rows, columns].div(scaled.loc[rows, "reference"], axis=0)
    return scaled


_COLUMNS = [
    *("method", "task", "interval", "metric", "quantity", "estimate", "low", "high", "at_least", "at_most"),
    *("median", "reference", "pairs", "arrived", "p_value", "q_value", "significant"),
]


def _compare(
    curves: pd.DataFrame, metric: str, method: str, baseline: str, level: float, axis: Axis, share: float
) -> list[dict[str, object]]:
    """The rows of one interval and method, all but what identifies them."""
    pairs = paired_values(curves, metric, method, baseline, axis)
    if pairs.empty:
        return []
    difference, mean = paired_difference(curves, metric, method, baseline, level, axis)
    area, mean_area = area_difference(curves, metric, method, baseline, level, axis)
    speed = speed_up(steps_to_baseline(curves, metric, baseline, axis, share=share), method, baseline, level)
    chance = probability_of_improvement(curves, metric, method, baseline, level, axis)
    better, worse = (pairs["own"] < pairs["reference"]).sum(), (pairs["own"] > pairs["reference"]).sum()
    sign_test = stats.binomtest(int(better), int(better + worse)).pvalue if better + worse else 1.0
    determined = np.isfinite(speed.interval.estimate)
    log_ratios = np.log(speed.ratios["low"].to_numpy()) if determined else np.array([np.nan])
    reference = float(pairs["reference"].mean())
    at_least, at_most = speed.mean_bounds
    bounds = {"at_least": at_least, "at_most": at_most, "median": speed.median}
    rows = [
        _row("difference", mean, mean_p_value(difference.to_numpy())),
        _row("speed_up", speed.interval, mean_p_value(log_ratios))
        | bounds
        | {"arrived": (speed.ratios["low"] > 0).sum()},
        _row("area_difference", mean_area, mean_p_value(area.to_numpy())),
        _row("probability", chance, sign_test),
    ]
    return [row | {"reference": reference} for row in rows]


def _row(quantity: Quantity, interval: Interval, p_value: float) -> dict[str, object]:
    return {
        "quantity": quantity,
        "estimate": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "at_least": interval.estimate,
        "at_most": interval.estimate,
        "pairs": interval.count,
        "p_value": p_value,
    }
