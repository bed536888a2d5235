"""How much of a task's gradient is sampling noise, and how many samples it takes to see through it.

The gradient noise scale B = tr(Σ) / |g|² (McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv
1812.06162, equation 2.9, "simple" noise scale) is the number of samples at which the squared noise of a mean gradient
equals its squared signal. What a batch of that size *suggests*: far below it, doubling the batch halves the steps that
training needs; far above it, more samples hardly help; at B, training takes twice the fewest possible steps and twice
the fewest possible samples (their section 2.3). The rule takes the curvature to be alike in all directions, and B to be
that of the moment: it is a guide to the order of magnitude, not a tuned batch size.
"""

from __future__ import annotations

import xarray as xr

from analysis.jackknife import Errors, pool_probes
from analysis.moments import as_other, unbiased_gramian


def noise_scale(gramian: xr.DataArray, count: xr.DataArray, *, errors: Errors = "probes") -> xr.Dataset:
    """B_k = tr(Σ_k) / |g_k|² of every task: the samples *of this task* at which noise equals signal.

    Trace and squared norm are unbiased and averaged over probes before dividing, as McCandlish et al. smooth both
    separately (appendix A.1). A mean gradient's own |ĝ_k|² in the place of |g_k|² can never give more than the samples
    it was measured with.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.
        errors: Over probes (of these networks), or over runs.

    Returns:
        ``noise_scale`` in samples and ``standard_error`` (..., task), NaN where |g_k|² cannot be told from zero: the
        noise scale is too large to be measured there.
    """
    pool = pool_probes(gramian, count)
    found = pool.estimate("noise_scale", lambda means: means["trace"] / means["squared_norm"], errors)
    return found.where(pool.is_positive(lambda means: means["squared_norm"])).assign_attrs(found.attrs)


def batch_noise_scale(
    gramian: xr.DataArray,
    count: xr.DataArray,
    *,
    shares: xr.DataArray,
    weights: xr.DataArray,
    stratified: bool = True,
    errors: Errors = "probes",
) -> xr.Dataset:
    """The noise scale of the whole loss Σ_k w_k L_k, whose batches give task k the share p_k of their samples.

    A batch of B samples then has a gradient Σ_k w_k ĝ_k with the squared signal |Σ_k w_k g_k|² and noise V / B, where
    V = Σ_k w_k² tr(Σ_k) / p_k if every batch holds exactly B p_k samples of task k (stratified), and
    V = Σ_k w_k² (tr(Σ_k) + |g_k|²) / p_k - |Σ_k w_k g_k|² if each sample's task is drawn by chance and its loss
    weighted by w_k / p_k. The noise scale is V over the squared signal: the whole batch that the rule suggests.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.
        shares: (task) p_k, as of `sample_shares`; they sum to 1.
        weights: (task) w_k, as of `update.loss_weights`.
        stratified: Whether batches hold fixed numbers of samples of each task.
        errors: Over probes (of these networks), or over runs.

    Returns:
        ``noise_scale`` in samples and ``standard_error`` (...), NaN where the squared signal cannot be told from zero.
    """
    pool = pool_probes(gramian, count)

    def signal(means: xr.Dataset) -> xr.DataArray:
        return (unbiased_gramian(means) * weights * as_other(weights)).sum(("task", "other_task"), skipna=False)

    def scale(means: xr.Dataset) -> xr.DataArray:
        if stratified:
            return (weights**2 / shares * means["trace"]).sum("task", skipna=False) / signal(means)
        single = weights**2 / shares * (means["trace"] + means["squared_norm"])
        return single.sum("task", skipna=False) / signal(means) - 1

    found = pool.estimate("noise_scale", scale, errors)
    return found.where(pool.is_positive(signal)).assign_attrs(found.attrs)


def suggested_batch(noise_scales: xr.DataArray, shares: xr.DataArray) -> xr.DataArray:
    """The whole batch in which each task gets as many samples as its own noise scale: B_k / p_k.

    Tasks disagree on it; `batch_noise_scale` is what their sum asks for.

    Args:
        noise_scales: (..., task) of `noise_scale`.
        shares: (task) share of a batch's samples that a task gets.
    """
    return noise_scales / shares.where(shares > 0)


def sample_shares(count: xr.DataArray) -> xr.DataArray:
    """Share of the samples that each task got (task), over all probes, from counts (gradient_step, task, half)."""
    samples = count.sum([dim for dim in count.dims if dim != "task"])
    return samples / samples.sum("task")
