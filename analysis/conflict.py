"""Gradient conflict between tasks, from Gramians alone.

Notation: g_k is the gradient of task k's mean loss, ĝ_k its estimate from n_k samples with per-sample covariance Σ_k,
and G_kl = <ĝ_k, ĝ_l>. Tasks use disjoint samples, so E G_kl = <g_k, g_l> for k != l, but E G_kk = |g_k|² + tr(Σ_k)/n_k:
the plain cosine is drawn towards zero by noise, by a factor of 60 at a noise scale of 1000 and 16 samples. Each task's
samples come in halves, and the product of two halves has expectation |g_k|² exactly; that is Spearman's correction for
attenuation (Spearman 1904), and equals McCandlish et al.'s |G|² (arXiv 1812.06162, appendix A.1) for two halves.

Arrays are those of `telemetry.read_telemetry`: a Gramian has the dimensions (gradient_step, ..., task, half,
other_task, other_half), sample counts (gradient_step, task, half). Steps are independent batches, so errors come from
the spread over steps.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy import stats

from analysis.gramians import STEP

NOISE_NULL = 0.5
"""Conflict rate of gradients that are pure noise: an inner product is as often negative as positive."""
_SIGNAL_ERRORS = 2.0


def task_gramian(gramian: xr.DataArray, count: xr.DataArray) -> xr.DataArray:
    """G_kl of the tasks' mean losses: ĝ_k is the mean of its halves, weighted by their samples.

    Returns:
        (gradient_step, ..., task, other_task); NaN where a task had no samples.
    """
    weight = count / count.sum("half").where(lambda total: total > 0)
    both = weight * _as_other(weight)
    return (gramian.where(both > 0, 0.0) * both).sum(("half", "other_half"), skipna=False)


def cosine(gramian: xr.DataArray) -> xr.DataArray:
    """cos φ_kl = G_kl / √(G_kk G_ll) of a task Gramian (..., task, other_task), not corrected for noise.

    Source: PCGrad (arXiv 2001.06782), definition 1 calls two tasks conflicting where it is negative.
    """
    norm = diagonal(gramian) ** 0.5
    return gramian / (norm * _as_other(norm))


def diagonal(matrix: xr.DataArray) -> xr.DataArray:
    """The diagonal (..., task) of (..., task, other_task)."""
    at = xr.DataArray(np.arange(matrix.sizes["task"]), dims="task")
    return matrix.isel(other_task=at).drop_vars([name for name in matrix.coords if str(name).startswith("other_")])


def squared_norms(gramian: xr.DataArray, count: xr.DataArray) -> xr.DataArray:
    """Unbiased |g_k|² from products of different halves: Σ_{h≠h'} n_h n_h' G_kh,kh' / Σ_{h≠h'} n_h n_h'.

    Returns:
        (gradient_step, ..., task). Single estimates can be negative; average over steps. NaN where a task has samples
        in fewer than two halves.
    """
    halves = gramian.sizes["half"]
    if halves < 2:
        raise ValueError("the Gramian has one half per task: noise correction needs probes with at least two halves")
    within = _within_task(gramian)
    weight = count * count.rename(half="other_half")
    different = xr.DataArray(1.0 - np.eye(halves), dims=("half", "other_half"))
    weight = weight * different
    total = weight.sum(("half", "other_half"))
    products = (within.where(weight > 0, 0.0) * weight).sum(("half", "other_half"), skipna=False)
    return products / total.where(total > 0)


def corrected_cosine(gramian: xr.DataArray, count: xr.DataArray) -> xr.Dataset:
    """Noise-corrected cosine: mean_s G_kl / √(mean_s |g_k|² · mean_s |g_l|²), with `squared_norms` below the root.

    Numerators and denominators are averaged over steps before dividing (a ratio of averages; the average of ratios is
    biased and has no finite variance). Values are not clipped: beyond 1 they show what the error says.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.

    Returns:
        ``cosine`` and ``standard_error`` (..., task, other_task; jackknife over steps) and ``signal`` (..., task; mean
        |g_k|² in units of its standard error). Cosines are NaN where a signal is at most 2 standard errors from zero,
        and with fewer than two steps, where that cannot be known.
    """
    products = task_gramian(gramian, count)
    norms = squared_norms(gramian, count)
    valid = norms.notnull().sum(STEP)
    error = norms.std(STEP, ddof=1) / np.sqrt(valid)
    signal = (norms.mean(STEP) / error).where(valid > 1)
    distinct = signal > _SIGNAL_ERRORS
    defined = distinct & _as_other(distinct)
    value = _ratio(products.mean(STEP), norms.mean(STEP))
    steps = products.notnull().sum(STEP)
    without = _ratio(_leave_one_out(products), _leave_one_out(norms))
    spread = ((without - without.mean(STEP)) ** 2).sum(STEP)
    standard_error = np.sqrt((steps - 1) / steps * spread)
    same = xr.DataArray(np.eye(value.sizes["task"], dtype=bool), dims=("task", "other_task"))
    return xr.Dataset(
        {
            "cosine": xr.where(same, 1.0, value).where(defined).transpose(*value.dims),
            "standard_error": xr.where(same, 0.0, standard_error).where(defined).transpose(*value.dims),
            "signal": signal,
        }
    )


def conflict_rate(gramian: xr.DataArray) -> xr.Dataset:
    """Share of task pairs whose gradients point against each other (PCGrad, definition 1), with its noise null.

    Pairs of one step share gradients, so the standard error is clustered: it comes from the spread of each step's rate.
    It is conditional on the runs at hand, and not a spread over seeds.
    Noise alone gives 0.5; a rate near 0.5 therefore means "not resolved", not "half of the tasks conflict".

    Args:
        gramian: Task Gramian (gradient_step, ..., task, other_task).

    Returns:
        ``rate`` and ``standard_error`` (...), ``by_step`` (gradient_step, ...), ``null`` (0.5), and ``null_error``: the
        standard deviation of one step's rate if all pairs were independent noise.
    """
    size = gramian.sizes["task"]
    above = xr.DataArray(np.triu(np.ones((size, size), dtype=bool), 1), dims=("task", "other_task"))
    known = gramian.notnull() & above
    pairs = known.sum(("task", "other_task"))
    by_step = ((gramian < 0) & known).sum(("task", "other_task")) / pairs.where(pairs > 0)
    steps = by_step.notnull().sum(STEP)
    error = by_step.std(STEP, ddof=1) / np.sqrt(steps)
    null_error = NOISE_NULL / (pairs.where(pairs > 0) ** 0.5).mean(STEP)
    return xr.Dataset(
        {
            "rate": by_step.mean(STEP),
            "standard_error": error.where(steps > 1),
            "by_step": by_step,
            "null": NOISE_NULL,
            "null_error": null_error,
        }
    )


def significant_pairs(gramian: xr.DataArray, false_discovery_rate: float = 0.05) -> xr.DataArray:
    """Pairs whose mean cosine over steps differs from zero: t-tests, Benjamini-Hochberg over all pairs (and layers).

    The sign of the plain cosine is unbiased although its size is not, so it is what is tested.

    Args:
        gramian: Task Gramian (gradient_step, ..., task, other_task).
        false_discovery_rate: Expected share of false findings among the pairs marked.

    Returns:
        (..., task, other_task) booleans, symmetric, False on the diagonal.
    """
    per_step = cosine(gramian)
    order = (STEP, *(dim for dim in per_step.dims if dim not in (STEP, "task", "other_task")), "task", "other_task")
    per_step = per_step.transpose(*order)
    above = np.triu_indices(per_step.sizes["task"], 1)
    values = per_step.values[..., above[0], above[1]]
    found = np.zeros(values.shape[1:], dtype=bool)
    if values.shape[0] > 1:
        p_value = stats.ttest_1samp(values, 0.0, axis=0, nan_policy="omit").pvalue
        tested = np.isfinite(p_value)
        found[tested] = stats.false_discovery_control(p_value[tested]) <= false_discovery_rate
    marked = np.zeros(per_step.shape[1:], dtype=bool)
    marked[..., above[0], above[1]] = found
    marked[..., above[1], above[0]] = found
    return per_step.isel({STEP: 0}, drop=True).copy(data=marked)


def magnitude_similarity(squared_norm: xr.DataArray) -> xr.DataArray:
    """Φ_kl = 2 |g_k| |g_l| / (|g_k|² + |g_l|²) (PCGrad, definition 2): 1 for equal norms, near 0 for very unequal ones.

    Args:
        squared_norm: (..., task), from `squared_norms` averaged over steps. Negative estimates give NaN.
    """
    positive = squared_norm.where(squared_norm > 0)
    other = _as_other(positive)
    return 2 * (positive * other) ** 0.5 / (positive + other)


def noise_scale(gramian: xr.DataArray, count: xr.DataArray) -> xr.DataArray:
    """B_k = tr(Σ_k) / |g_k|², the batch size at which noise equals signal (McCandlish et al., arXiv 1812.06162).

    tr(Σ_k) is estimated by mean_h n_h (G_kh,kh - |g_k|²); both parts are averaged over steps before dividing.

    Returns:
        (..., task) in samples; NaN where |g_k|² is not distinguishable from zero.
    """
    norms = squared_norms(gramian, count)
    same = xr.DataArray(np.arange(gramian.sizes["half"]), dims="half")
    own = _within_task(gramian).isel(other_half=same)
    trace = ((own - norms) * count).mean("half").mean(STEP)
    error = norms.std(STEP, ddof=1) / np.sqrt(norms.notnull().sum(STEP))
    mean = norms.mean(STEP)
    return trace / mean.where(mean > _SIGNAL_ERRORS * error)


def _as_other(values: xr.DataArray) -> xr.DataArray:
    """The same values along ``other_task`` (and ``other_half``) instead of ``task`` (and ``half``)."""
    plain = values.drop_vars([name for name in values.coords if name != STEP and "task" in values[name].dims])
    return plain.rename({dim: f"other_{dim}" for dim in ("task", "half") if dim in plain.dims})


def _within_task(gramian: xr.DataArray) -> xr.DataArray:
    """Products of a task's own halves: (gradient_step, ..., task, half, other_half)."""
    return diagonal(gramian)


def _ratio(products: xr.DataArray, norms: xr.DataArray) -> xr.DataArray:
    norm = norms.where(norms > 0) ** 0.5
    return products / (norm * _as_other(norm))


def _leave_one_out(values: xr.DataArray) -> xr.DataArray:
    """Means over all steps but one, for each step."""
    steps = values.notnull().sum(STEP)
    return (values.sum(STEP) - values) / (steps - 1).where(steps > 1)
