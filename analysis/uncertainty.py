"""Error bars that hold for few seeds.

The unit is the whole run: everything measured in one run shares its initialisation and data order, so steps or tasks
must not be resampled as if they were independent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

FEW_SEEDS = 10
"""Below this many seeds every seed is shown, beside a paired t-interval."""
_ENOUGH_TO_CLAIM = 3


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: The mean (or other statistic).
        low: Lower end; NaN if the data cannot carry an interval.
        high: Upper end; likewise.
        level: Confidence level.
        count: Independent units (runs, or pairs of runs) behind it.
    """

    estimate: float
    low: float
    high: float
    level: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero; False if there is no interval."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float] | npt.NDArray[np.float64], level: float = 0.95) -> Interval:
    """Student's t-interval of a mean. For paired comparisons pass the differences, one per seed.

    With two values the interval is honest but enormous (t = 12.7 at 95 %); with one there is none (NaN).
    """
    sample = np.asarray(values, dtype=float)
    if sample.size == 0:
        return Interval(np.nan, np.nan, np.nan, level, 0)
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean, np.nan, np.nan, level, 1)
    half = float(stats.t.ppf((1 + level) / 2, sample.size - 1) * sample.std(ddof=1) / np.sqrt(sample.size))
    return Interval(mean, mean - half, mean + half, level, sample.size)


def bootstrap_runs(
    runs: npt.NDArray[np.float64],
    statistic: Callable[[npt.NDArray[np.float64]], float],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over whole runs (Efron 1979); too narrow below about 10 runs, see `FEW_SEEDS`.

    Args:
        runs: (N, ...) one entry per run, for instance its whole curve.
        statistic: From a resampled array of the same shape to a number; a functional of the curve (a speed-up, an area)
            rather than a point on it.
        resamples: Number of resamples.
        level: Confidence level.
        seed: Of its own generator.
    """
    rng = np.random.default_rng(seed)
    draws = [statistic(runs[rng.integers(len(runs), size=len(runs))]) for _ in range(resamples)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(runs)), float(low), float(high), level, len(runs))


def seed_warning(count: int) -> str | None:
    """What to tell a reader about this many seeds per method, or None if they are enough."""
    if count < 2:
        return "One seed: the difference between methods cannot be told from the difference between seeds."
    if count < _ENOUGH_TO_CLAIM:
        return (
            f"{count} seeds: an interval from so few rests on the t-distribution alone; take one that excludes zero as "
            f"a hint, and run at least {_ENOUGH_TO_CLAIM}, better 5, seeds of each method before claiming it."
        )
    return None
