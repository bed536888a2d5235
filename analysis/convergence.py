"""Does a method converge faster, or does it only look so? Curves over seeds, final values, areas, who is better.

Curves come as the tidy frame of `frames.curves_frame`, or of any other metric with the axes of `axes.add_axes`; lower
is better. Runs of two methods with the same seed share initialisation and data order, so comparisons are paired by
seed. ``axis`` says what training is measured in: steps, samples, seconds of training, floating-point operations. Times
to a threshold are in `arrivals`, speed-ups in `speedup`; both can be had from here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from analysis.arrivals import Arrival, arrival_profile, arrivals, median_arrivals, steps_to_baseline, steps_to_threshold
from analysis.axes import Axis, Curve, SeedCurves, paired_curves, seed_curves
from analysis.methods import ordered
from analysis.speedup import SpeedUp, speed_up, speed_up_curve
from analysis.uncertainty import FEW_SEEDS, FloatArray, Interval, bootstrap_mean, mean_interval, proportion_interval

__all__ = [
    "Arrival",
    "SpeedUp",
    "aligned_curves",
    "area_difference",
    "area_under_curve",
    "arrival_profile",
    "arrivals",
    "curve_bands",
    "mean_curves",
    "median_arrivals",
    "paired_difference",
    "paired_values",
    "probability_of_improvement",
    "smoothed_curves",
    "speed_up",
    "speed_up_curve",
    "steps_to_baseline",
    "steps_to_threshold",
]

_MAX_POINTS = 1000
"""Positions on the common axis of runs that were not measured at the same ones."""
_TINIEST = 1e-300


def aligned_curves(curves: pd.DataFrame, metric: str, axis: Axis = "step") -> pd.DataFrame:
    """One metric of all runs on one axis, for example for bands over seeds.

    Args:
        curves: Tidy frame.
        metric: One of its metrics.
        axis: What to draw it against.

    Returns:
        Index ``axis``, columns (method, seed): the value, interpolated linearly between a run's own measurements and
        NaN beyond them; the mean where a method has several runs with one seed. The index holds the positions of all
        measurements, or up to 1,000 of them where runs were not measured at the same ones (seconds).
    """
    return _on_grid(seed_curves(curves, metric, axis), axis, _interpolated)


def smoothed_curves(curves: pd.DataFrame, metric: str, bandwidth: float, axis: Axis = "step") -> pd.DataFrame:
    """As `aligned_curves`, with the noise of single measurements smoothed out of every run.

    Local linear regression with a Gaussian kernel (Fan, Journal of the American Statistical Association 87, 1992): at
    each position a line is fitted to the measurements around it, on both sides alike. So a straight line comes out as
    it was, also at both ends, and nothing lags behind, as it does in an exponential moving average. A measurement that
    is NaN counts for nothing, and where a curve has no value (outside of a run, after it diverged) it gets none.

    Args:
        curves: Tidy frame.
        metric: One of its metrics.
        bandwidth: Standard deviation of the kernel in units of the axis. What is shorter than it cannot be seen.
        axis: What to draw it against.

    Raises:
        ValueError: If the bandwidth is not positive.
    """
    if not bandwidth > 0:
        raise ValueError(f"a bandwidth must be positive, not {bandwidth}")
    return _on_grid(seed_curves(curves, metric, axis), axis, partial(_local_linear, bandwidth=bandwidth))


def _on_grid(found: SeedCurves, axis: Axis, evaluate: Callable[[Curve, FloatArray], FloatArray]) -> pd.DataFrame:
    grid = np.unique(np.concatenate([curve.x for curve in found.values()])) if found else np.empty(0)
    longest = max((len(curve.x) for curve in found.values()), default=0)
    if len(grid) > max(_MAX_POINTS, longest):
        grid = grid[np.linspace(0, len(grid) - 1, _MAX_POINTS).round().astype(int)]
    columns = pd.MultiIndex.from_tuples(list(found), names=["method", "seed"])
    values = np.array([evaluate(curve, grid) for curve in found.values()]).reshape(len(found), len(grid))
    index = pd.Index(grid.astype(np.int64) if axis == "step" else grid, name=axis)
    return pd.DataFrame(values.T, index=index, columns=columns)


def _interpolated(curve: Curve, grid: FloatArray) -> FloatArray:
    return np.interp(grid, curve.x, curve.value, left=np.nan, right=np.nan)


def _local_linear(curve: Curve, grid: FloatArray, bandwidth: float) -> FloatArray:
    smooth = _interpolated(curve, grid)
    inside = np.isfinite(smooth)
    known = np.isfinite(curve.value)
    x, value = curve.x[known], curve.value[known]
    distance = (x - grid[inside, None]) / bandwidth
    square = distance**2
    # The nearest measurement weighs 1 however far it is, so that no position is without any.
    weight = np.exp((square.min(axis=1, keepdims=True) - square) / 2)
    weight /= weight.sum(axis=1, keepdims=True)
    centre, level = (weight * distance).sum(axis=1), weight @ value
    offset = distance - centre[:, None]
    spread, slope = (weight * offset**2).sum(axis=1), (weight * offset) @ value
    smooth[inside] = level - centre * slope / np.maximum(spread, _TINIEST)
    return smooth


def mean_curves(aligned: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of `aligned_curves`, per method, where all seeds have a value (else the mean would jump)."""
    methods = list(dict.fromkeys(aligned.columns.get_level_values("method")))
    return pd.DataFrame({method: aligned[method].mean(axis=1, skipna=False) for method in methods})


def curve_bands(aligned: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Mean over seeds with a band, where all seeds of a method have a value.

    From `uncertainty.FEW_SEEDS` seeds on the band is a bootstrap interval of the mean at each position, over whole runs
    (nominal; with 10 runs about 90 % of 95 % intervals hold the truth). Below it would be far too narrow, and the band
    is the range of the seeds, which speaks of them alone.

    Args:
        aligned: `aligned_curves` or `smoothed_curves`.
        level: Confidence level of the bootstrap.

    Returns:
        Columns method, the axis, mean, low, high, seeds, band (``"bootstrap"`` or ``"range"``).
    """
    pieces = []
    for method in ordered(aligned.columns.get_level_values("method")):
        own = aligned[method].dropna()
        values = own.to_numpy().T
        seeds = len(values)
        piece = pd.DataFrame({"method": method, aligned.index.name: own.index, "mean": values.mean(axis=0)})
        if seeds >= FEW_SEEDS:
            band = bootstrap_mean(values, level=level)
            piece = piece.assign(low=band.low, high=band.high, seeds=seeds, band="bootstrap")
        else:
            piece = piece.assign(low=values.min(axis=0), high=values.max(axis=0), seeds=seeds, band="range")
        pieces.append(piece)
    return pd.concat(pieces, ignore_index=True)


def paired_values(
    curves: pd.DataFrame, metric: str, method: str, baseline: str = "baseline", axis: Axis = "step"
) -> pd.DataFrame:
    """Values of a method and of the baseline at equal cost: at the last position that both runs of a seed reached.

    On the axis ``step`` these are the final values, if both ran equally long.

    Returns:
        Index seed (those that both have, and whose curves overlap), columns own and reference; NaN if diverged.
    """
    rows = {}
    for seed, pair in paired_curves(seed_curves(curves, metric, axis), method, baseline).items():
        begin, budget = _common_stretch(pair)
        if begin <= budget:
            rows[seed] = [float(np.interp(budget, *curve)) for curve in pair]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["own", "reference"]).rename_axis("seed")


def paired_difference(
    curves: pd.DataFrame,
    metric: str,
    method: str,
    baseline: str = "baseline",
    level: float = 0.95,
    axis: Axis = "step",
) -> tuple[pd.Series, Interval]:
    """Value of a method minus the baseline's at equal cost (see `paired_values`), and the interval of its mean.

    Returns:
        Differences indexed by the seeds that both have (negative: the method is better), and the interval. A diverged
        run (NaN) stays among them and makes the mean NaN: leaving it out would flatter its method.
    """
    pairs = paired_values(curves, metric, method, baseline, axis)
    difference = pairs["own"] - pairs["reference"]
    return difference, mean_interval(difference.to_numpy(), level)


def probability_of_improvement(
    curves: pd.DataFrame,
    metric: str,
    method: str,
    baseline: str = "baseline",
    level: float = 0.95,
    axis: Axis = "step",
) -> Interval:
    """Probability that a run of the method ends lower than the baseline's with the same seed, with its exact interval.

    Ties count half; a run that diverged loses against one that did not. With fewer than 6 pairs the 95 % interval
    includes 0.5 even if the method won them all.
    """
    pairs = paired_values(curves, metric, method, baseline, axis).fillna(np.inf)
    wins = (pairs["own"] < pairs["reference"]).sum() + (pairs["own"] == pairs["reference"]).sum() / 2
    return proportion_interval(float(wins), len(pairs), level)


def area_under_curve(
    curves: pd.DataFrame, metric: str, axis: Axis = "step", *, log_axis: bool = False, budget: float | None = None
) -> pd.DataFrame:
    """Mean of every curve over the axis, from where all of them have begun to where the first one ends.

    Unlike a final value it rewards being ahead on the way; unlike a time to a threshold it needs none. The curve is
    linear between measurements, and the mean is the area by the trapezoidal rule over the length of the axis.

    Args:
        curves: Tidy frame; its shortest run sets the budget, so leave out what is not compared.
        metric: One of its metrics.
        axis: What the mean is over.
        log_axis: Whether to give equal weight to equal factors of the axis, so that the beginning counts as much.
        budget: Where to end, at most the end of the shortest run (the default).

    Returns:
        Columns method, seed, area; NaN if the run diverged on the way.

    Raises:
        ValueError: If the curves have no stretch of the axis in common, or the budget lies outside of it.
    """
    found = seed_curves(curves, metric, axis)
    if not found:
        return pd.DataFrame(columns=["method", "seed", "area"])
    low, shortest = _common_stretch(found.values())
    high = shortest if budget is None else budget
    if not low <= high <= shortest:
        raise ValueError(
            f"curves of {metric} have {axis} {low:g} to {shortest:g} in common, which does not reach to {high:g}: "
            "choose another budget, or leave out the runs that start late or end early"
        )
    rows = [(*key, _mean_between(curve, low, high, log_axis)) for key, curve in found.items()]
    return pd.DataFrame(rows, columns=["method", "seed", "area"])


def _common_stretch(curves: Collection[Curve]) -> tuple[float, float]:
    """From where all have begun to where the first one ends; the wrong way round if they have nothing in common."""
    return max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)


def _mean_between(curve: Curve, low: float, high: float, log_axis: bool) -> float:
    if log_axis and low <= 0:
        raise ValueError(f"a logarithmic axis cannot begin at {low:g}: leave out the measurement there")
    if low == high:
        return float(np.interp(low, *curve))
    x = np.concatenate([[low], curve.x[(curve.x > low) & (curve.x < high)], [high]])
    along = np.log(x) if log_axis else x
    return float(trapezoid(np.interp(x, *curve), along) / (along[-1] - along[0]))


def area_difference(
    curves: pd.DataFrame,
    metric: str,
    method: str,
    baseline: str = "baseline",
    level: float = 0.95,
    axis: Axis = "step",
    *,
    log_axis: bool = False,
) -> tuple[pd.Series, Interval]:
    """Area of a method minus the baseline's with the same seed, as `paired_difference`; negative is better.

    Each pair is compared over what both of its runs measured, so a run that ended early shortens its own pair alone;
    pairs without a common stretch are left out, as in `paired_values`.
    """
    differences = {}
    for seed, pair in paired_curves(seed_curves(curves, metric, axis), method, baseline).items():
        low, high = _common_stretch(pair)
        if low <= high:
            own, reference = (_mean_between(curve, low, high, log_axis) for curve in pair)
            differences[seed] = own - reference
    difference = pd.Series(differences, dtype=float, name="area").rename_axis("seed")
    return difference, mean_interval(list(differences.values()), level)
