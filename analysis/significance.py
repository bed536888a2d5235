"""Which pairs of tasks conflict beyond doubt, and how often: z-scores, false discovery rates, conflict rates."""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy import stats

from analysis.conflict import cosine
from analysis.gramians import STEP
from analysis.jackknife import Errors, pool_probes, pool_series
from analysis.moments import task_gramian

NOISE_NULL = 0.5
"""Conflict rate of gradients that are pure noise: an inner product is as often negative as positive."""
FALSE_DISCOVERY_RATE = 0.05
_PAIR = ("task", "other_task")


def z_scores(gramian: xr.DataArray, count: xr.DataArray, *, errors: Errors = "probes") -> xr.Dataset:
    """Cosine of every pair in units of its standard error, with p-values and false discovery control.

    Noise changes the size of the plain cosine but not its sign, which is also the corrected cosine's; so the plain one
    is what is tested, and no halves are needed. The null is Student's t with one degree of freedom fewer than there are
    units: batches of consecutive probes, so that autocorrelated probes do not pass for independent ones, or runs (see
    `jackknife`). p-values are adjusted over all pairs and all layers or blocks at once (Benjamini and Hochberg, Journal
    of the Royal Statistical Society B 57, 1995).

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.
        errors: Over probes (of these networks), or over runs.

    Returns:
        ``z``, ``p_value`` (two-sided) and ``q_value`` (the smallest false discovery rate at which the pair is found),
        all (..., task, other_task), symmetric, NaN on the diagonal and where nothing can be said.
    """
    pool = pool_probes(gramian, count, halved=False)
    found = pool.estimate("cosine", lambda means: cosine(means["product"]), errors)
    z = found["cosine"] / found["standard_error"].where(found["standard_error"] > 0)
    z = z.where(z["task"] != z["other_task"]).transpose(..., *_PAIR)
    p_value = z.copy(data=2 * stats.t.sf(np.abs(z.values), max(found.attrs["units"] - 1, 1)))
    above = np.triu_indices(z.sizes["task"], 1)
    tested = p_value.values[..., above[0], above[1]]
    adjusted = np.full_like(tested, np.nan)
    adjusted[np.isfinite(tested)] = stats.false_discovery_control(tested[np.isfinite(tested)])
    q_value = z.copy(data=np.full(z.shape, np.nan))
    q_value.values[..., above[0], above[1]] = adjusted
    q_value.values[..., above[1], above[0]] = adjusted
    return xr.Dataset({"z": z, "p_value": p_value, "q_value": q_value}, attrs=found.attrs)


def significant_pairs(scores: xr.Dataset, false_discovery_rate: float = FALSE_DISCOVERY_RATE) -> xr.DataArray:
    """Pairs whose cosine differs from zero.

    Args:
        scores: From `z_scores`.
        false_discovery_rate: Expected share of false findings among the pairs marked.

    Returns:
        (..., task, other_task) booleans, symmetric, False on the diagonal.
    """
    return scores["q_value"] <= false_discovery_rate


def conflict_rate(gramian: xr.DataArray, count: xr.DataArray, *, errors: Errors = "probes") -> xr.Dataset:
    """Share of task pairs whose gradients point against each other (PCGrad, definition 1), with its noise null.

    Pairs of one probe share gradients, so the standard error is clustered: it comes from the spread of the probes'
    rates, or with ``errors="runs"`` of the runs'. Noise alone gives 0.5; a rate near 0.5 therefore means "not
    resolved", not "half of the tasks conflict". Which pairs do conflict is what ``conflicting`` counts.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.
        errors: Over probes (of these networks), or over runs.

    Returns:
        ``rate`` and ``standard_error`` (...); ``by_step`` (gradient_step, ...); ``null`` (0.5) and ``null_error``: the
        standard deviation of one step's rate if all pairs were independent noise; ``conflicting`` and ``agreeing``
        (...): the share of pairs whose cosine, corrected or not, is significantly negative or positive by `z_scores`
        over all pairs and layers; and ``pairs`` (...), how many could be tested. Those that neither counts are not
        resolved.
    """
    products = task_gramian(gramian, count)
    size = products.sizes["task"]
    above = xr.DataArray(np.triu(np.ones((size, size), dtype=bool), 1), dims=_PAIR)
    known = products.notnull() & above
    pairs = known.sum(_PAIR)
    by_step = ((products < 0) & known).sum(_PAIR) / pairs.where(pairs > 0)
    pool = pool_series(xr.Dataset({"by_step": by_step}), gramian)
    found = pool.estimate("rate", lambda means: means["by_step"], errors)
    scores = z_scores(gramian, count, errors=errors)
    significant = significant_pairs(scores) & above
    tested = (scores["z"].notnull() & above).sum(_PAIR)
    for name, side in (("conflicting", scores["z"] < 0), ("agreeing", scores["z"] > 0)):
        found[name] = (significant & side).sum(_PAIR) / tested.where(tested > 0)
    found["pairs"] = tested
    found["by_step"] = by_step
    found["null"] = NOISE_NULL
    found["null_error"] = NOISE_NULL / (pairs.where(pairs > 0) ** 0.5).mean(STEP)
    return found
