"""Which pairs of tasks conflict beyond doubt, and how often: z-scores, false discovery rates, conflict rates."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from analysis.conflict import cosine
from analysis.gramians import STEP
from analysis.jackknife import Errors, pool_probes, pool_series
from analysis.moments import labelled, plain_arrays, probe_chunks, products_of

NOISE_NULL = 0.5
"""Conflict rate of gradients that are pure noise: an inner product is as often negative as positive."""
FALSE_DISCOVERY_RATE = 0.05
_PAIR = ("task", "other_task")


def q_values(p_values: pd.Series) -> pd.Series:
    """Benjamini and Hochberg's q-values over those that could be tested, NaN for the others."""
    tested = p_values.dropna().astype(float)
    adjusted = stats.false_discovery_control(tested) if len(tested) else tested
    return pd.Series(adjusted, tested.index, dtype=float).reindex(p_values.index)


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
    found = pool.estimate("cosine", lambda means: cosine(means["product"]), errors).transpose(..., *_PAIR)
    value, error = found["cosine"].values, found["standard_error"].values
    tasks = value.shape[-1]
    z = np.divide(value, error, out=np.full(value.shape, np.nan), where=(error > 0) & ~np.eye(tasks, dtype=bool))
    p_value = 2 * stats.t.sf(np.abs(z), max(found.attrs["units"] - 1, 1))
    above = np.triu_indices(tasks, 1)
    tested = p_value[..., *above]
    known = np.isfinite(tested)
    tested[known] = stats.false_discovery_control(tested[known])
    q_value = np.full(z.shape, np.nan)
    q_value[..., *above] = q_value[..., *above[::-1]] = tested
    scores = {"z": z, "p_value": p_value, "q_value": q_value}
    dims = found["cosine"].dims
    return xr.Dataset({name: (dims, values) for name, values in scores.items()}, found.coords, found.attrs)


def significant_pairs(scores: xr.Dataset, false_discovery_rate: float = FALSE_DISCOVERY_RATE) -> xr.DataArray:
    """Pairs whose cosine differs from zero.

    Args:
        scores: From `z_scores`.
        false_discovery_rate: Expected share of false findings among the pairs marked.

    Returns:
        (..., task, other_task) booleans, symmetric, False on the diagonal.
    """
    return scores["q_value"] <= false_discovery_rate


def probe_rate(gramian: xr.DataArray, count: xr.DataArray, *, errors: Errors = "probes") -> xr.Dataset:
    """Share of task pairs whose gradients point against each other (PCGrad, definition 1), with its noise null.

    Pairs of one probe share gradients, so the standard error is clustered: it comes from the spread of the probes'
    rates, or with ``errors="runs"`` of the runs'. Noise alone gives 0.5; a rate near 0.5 therefore means "not
    resolved", not "half of the tasks conflict". Which pairs do conflict is what `conflict_rate` adds.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.
        errors: Over probes (of these networks), or over runs.

    Returns:
        ``rate`` and ``standard_error`` (...); ``by_step`` (gradient_step, ...); ``null`` (0.5) and ``null_error``: the
        standard deviation of one step's rate if all pairs were independent noise.
    """
    by_step, pairs = _rates_and_pairs(gramian, count)
    pool = pool_series(xr.Dataset({"by_step": by_step}), gramian)
    found = pool.estimate("rate", lambda means: means["by_step"], errors)
    null_error = NOISE_NULL / (pairs.where(pairs > 0) ** 0.5).mean(STEP)
    return found.assign({"by_step": by_step, "null": NOISE_NULL, "null_error": null_error})


def conflict_rate(gramian: xr.DataArray, count: xr.DataArray, *, errors: Errors = "probes") -> xr.Dataset:
    """`probe_rate`, and which pairs conflict beyond the noise of single probes.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.
        errors: Over probes (of these networks), or over runs.

    Returns:
        The variables of `probe_rate`; ``conflicting`` and ``agreeing`` (...): the share of pairs whose cosine,
        corrected or not, is significantly negative or positive by `z_scores` over all pairs and layers; and ``pairs``
        (...), how many could be tested. Those that neither counts are not resolved.
    """
    found = probe_rate(gramian, count, errors=errors)
    scores = z_scores(gramian, count, errors=errors)
    above = np.triu_indices(scores.sizes["task"], 1)
    z, significant = (values.values[..., *above] for values in (scores["z"], significant_pairs(scores)))
    tested = np.isfinite(z).sum(-1)
    dims = scores["z"].dims[:-2]
    with np.errstate(invalid="ignore", divide="ignore"):  # no pair could be tested
        shares = {
            name: (dims, (significant & side).sum(-1) / tested)
            for name, side in (("conflicting", z < 0), ("agreeing", z > 0))
        }
    return found.assign({**shares, "pairs": (dims, tested)})


def rates_by_step(gramian: xr.DataArray, count: xr.DataArray) -> xr.DataArray:
    """``by_step`` of `probe_rate` alone: (gradient_step, ...)."""
    return _rates_and_pairs(gramian, count)[0]


def _rates_and_pairs(gramian: xr.DataArray, count: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """The share of pairs with a negative product (gradient_step, ...), and the number of pairs that are known."""
    values, counts, lead = plain_arrays(gramian, count)
    above = np.triu_indices(values.shape[2], 1)
    pairs = np.zeros(values.shape[:2], dtype=np.int64)
    negative = pairs.copy()
    for rows in probe_chunks(values):
        products = products_of(values[rows], counts[rows])[..., *above]
        pairs[rows] = (~np.isnan(products)).sum(-1)
        negative[rows] = (products < 0).sum(-1)
    rates = np.divide(negative, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)
    shape = [gramian.sizes[dim] for dim in (STEP, *lead)]
    by_step, known = (labelled(found.reshape(shape), (STEP, *lead), gramian) for found in (rates, pairs))
    return by_step, known
