"""What an update does to each task: whose gradient it follows, who stands against the rest, who is helped.

The update is taken along g = Σ_k w_k g_k, the gradient of the weighted sum of the tasks' mean losses. All inner
products with g are sums of entries of the Gramian; those of a task with itself are the unbiased squared norms of
`moments`, because noise makes every task seem to agree with the sum that holds it.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis.jackknife import Errors, pool_probes
from analysis.moments import as_other, diagonal, unbiased_gramian


def loss_weights(tasks: xr.Dataset | xr.DataArray) -> xr.DataArray:
    """w_k (task) of the loss that training minimises, the mean over uniform t: the tasks' shares of the timesteps.

    Args:
        tasks: Anything with the coordinates ``t_low`` and ``t_high`` of `gramians.task_coordinates`.
    """
    width = tasks["t_high"] - tasks["t_low"] + 1
    return (width / width.sum("task")).drop_vars([name for name in width.coords if name != "task"])


def update_cosine(
    gramian: xr.DataArray, count: xr.DataArray, *, weights: xr.DataArray | None = None, errors: Errors = "probes"
) -> xr.Dataset:
    """cos(g_k, Σ_l w_l g_l), noise-corrected: how far the update goes the task's own way; below zero it does harm.

    Source: the similarity that ConFIG (arXiv 2408.11104) reports of each gradient and the common direction.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.
        weights: (task) w_l; equal without them. `loss_weights` are those of the training loss.
        errors: Over probes (of these networks), or over runs.

    Returns:
        ``cosine`` and ``standard_error`` (..., task), NaN where |g_k|² or |g|² cannot be told from zero.
    """
    pool = pool_probes(gramian, count)
    weight = _weights(gramian, weights)

    def squared_sum(means: xr.Dataset) -> xr.DataArray:
        return _squared_sum(unbiased_gramian(means), weight)

    def cosine(means: xr.Dataset) -> xr.DataArray:
        norms = means["squared_norm"] * squared_sum(means)
        return _with_sum(unbiased_gramian(means), weight) / norms.where(norms > 0) ** 0.5

    known = pool.is_positive(_squared_norm) & pool.is_positive(squared_sum)
    found = pool.estimate("cosine", cosine, errors)
    return found.where(known).assign_attrs(found.attrs)


def update_share(
    gramian: xr.DataArray, count: xr.DataArray, *, weights: xr.DataArray | None = None, errors: Errors = "probes"
) -> xr.Dataset:
    """<w_k g_k, g> / |g|², noise-corrected: the part of the update's length that a task contributes.

    To first order it is also the share of the weighted loss's decrease that comes from w_k L_k. The shares of all tasks
    sum to 1; a negative one belongs to a task that the update makes worse.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.
        weights: (task) w_k; equal without them.
        errors: Over probes (of these networks), or over runs.

    Returns:
        ``share`` and ``standard_error`` (..., task), NaN where |g|² cannot be told from zero.
    """
    pool = pool_probes(gramian, count)
    weight = _weights(gramian, weights)

    def share(means: xr.Dataset) -> xr.DataArray:
        every = unbiased_gramian(means)
        return _with_sum(every, weight) * weight / _squared_sum(every, weight)

    found = pool.estimate("share", share, errors)
    known = pool.is_positive(lambda means: _squared_sum(unbiased_gramian(means), weight))
    return found.where(known).assign_attrs(found.attrs)


def rest_cosine(
    gramian: xr.DataArray,
    count: xr.DataArray,
    *,
    weights: xr.DataArray | None = None,
    corrected: bool = True,
    errors: Errors = "probes",
) -> xr.Dataset:
    """cos(g_k, Σ_{l≠k} w_l g_l): whether a task goes with all the others or against them.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.
        weights: (task) w_l; equal without them.
        corrected: With unbiased squared norms, or with those of the noisy gradients, as is usually reported.
        errors: Over probes (of these networks), or over runs.

    Returns:
        ``cosine`` and ``standard_error`` (..., task), if corrected NaN where |g_k|² or the squared norm of the rest
        cannot be told from zero.
    """
    pool = pool_probes(gramian, count, halved=corrected)
    weight = _weights(gramian, weights)

    def products(means: xr.Dataset) -> xr.DataArray:
        return unbiased_gramian(means) if corrected else means["product"]

    def squared_rest(means: xr.Dataset) -> xr.DataArray:
        # |g - w_k g_k|²
        every = products(means)
        own = weight**2 * diagonal(every) - 2 * weight * _with_sum(every, weight)
        return _squared_sum(every, weight) + own

    def cosine(means: xr.Dataset) -> xr.DataArray:
        every = products(means)
        norms = diagonal(every) * squared_rest(means)
        return (_with_sum(every, weight) - weight * diagonal(every)) / norms.where(norms > 0) ** 0.5

    found = pool.estimate("cosine", cosine, errors)
    if not corrected:
        return found
    known = pool.is_positive(_squared_norm) & pool.is_positive(squared_rest)
    return found.where(known).assign_attrs(found.attrs)


def first_order_tag(
    gramian: xr.DataArray,
    count: xr.DataArray,
    loss: xr.DataArray,
    learning_rate: float | xr.DataArray,
    *,
    relative: bool = False,
    errors: Errors = "probes",
) -> xr.Dataset:
    """Z_{k→l} = η <g_k, g_l> / L_l: the share of task l's loss that a gradient step of length η on task k removes.

    Source: the Taylor expansion of task affinity grouping's lookahead 1 - L_l(θ - η g_k) / L_l(θ) (Fifty et al., arXiv
    2109.04617, equation 1), which needs K further steps and K x K evaluations. Products and losses are averaged over
    probes before dividing; the diagonal takes the unbiased squared norm, where the plain one is too large by the
    gradient's noise. It speaks of gradient descent: under Adam the step is rescaled by coordinates that the Gramian
    does not know.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.
        loss: (gradient_step, task, half) mean losses of the groups, those whose gradients were measured.
        learning_rate: η, one number or one for every probe (gradient_step).
        relative: Whether to divide by what a step on task l itself removes, Z_{l→l}. Losses cancel, and so does a rate
            that is the same at all probes. NaN where the gradient of l cannot be told from noise.
        errors: Over probes (of these networks), or over runs.

    Returns:
        ``affinity`` (..., task, other_task), from task to other_task, not symmetric, and ``standard_error``.
    """
    samples = count.sum("half")
    task_loss = (loss.where(count > 0, 0.0) * count).sum("half", skipna=False) / samples.where(samples > 0)
    pool = pool_probes(gramian * learning_rate, count, series={"loss": task_loss})
    if not relative:
        return pool.estimate("affinity", lambda means: unbiased_gramian(means) / as_other(means["loss"]), errors)
    found = pool.estimate("affinity", lambda means: unbiased_gramian(means) / as_other(means["squared_norm"]), errors)
    return found.where(as_other(pool.is_positive(_squared_norm))).assign_attrs(found.attrs)


def condition_number(gramian: xr.DataArray, count: xr.DataArray, *, errors: Errors = "probes") -> xr.Dataset:
    """√(λ_max / λ_min) of the Gramian of the tasks, noise-corrected: 1 for orthogonal gradients of equal length.

    Source: Aligned-MTL (arXiv 2305.19000) takes the condition number of the matrix of task gradients as the criterion
    of stability: a large one means that a task dominates or that some cancel. Noise adds to the diagonal and hides it.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.
        errors: Over probes (of these networks), or over runs.

    Returns:
        ``condition_number`` and ``standard_error`` (...), NaN where the smallest eigenvalue cannot be told from zero;
        there the gradients may be linearly dependent.
    """
    pool = pool_probes(gramian, count)

    def ratio(means: xr.Dataset) -> xr.DataArray:
        eigenvalues = _eigenvalues(means)
        smallest = eigenvalues.isel(rank=0)
        return (eigenvalues.isel(rank=-1) / smallest.where(smallest > 0)) ** 0.5

    found = pool.estimate("condition_number", ratio, errors)
    known = pool.is_positive(lambda means: _eigenvalues(means).isel(rank=0))
    return found.where(known).assign_attrs(found.attrs)


def _eigenvalues(means: xr.Dataset) -> xr.DataArray:
    """(..., rank), ascending; NaN where an inner product is unknown."""
    every = unbiased_gramian(means)
    lead = [dim for dim in every.dims if dim not in ("task", "other_task")]
    values = every.transpose(*lead, "task", "other_task").values
    known = np.isfinite(values).all((-1, -2))
    found = np.where(known[..., None], np.linalg.eigvalsh(np.where(known[..., None, None], values, 0.0)), np.nan)
    return xr.DataArray(found, dims=(*lead, "rank"), coords={dim: every[dim] for dim in lead if dim in every.coords})


def _weights(gramian: xr.DataArray, weights: xr.DataArray | None) -> xr.DataArray:
    if weights is None:
        return xr.DataArray(np.full(gramian.sizes["task"], 1.0 / gramian.sizes["task"]), dims="task")
    return weights


def _squared_norm(means: xr.Dataset) -> xr.DataArray:
    return means["squared_norm"]


def _with_sum(products: xr.DataArray, weights: xr.DataArray) -> xr.DataArray:
    """<g_k, Σ_l w_l g_l> (..., task)."""
    return (products * as_other(weights)).sum("other_task", skipna=False)


def _squared_sum(products: xr.DataArray, weights: xr.DataArray) -> xr.DataArray:
    """|Σ_k w_k g_k|² (...)."""
    return (_with_sum(products, weights) * weights).sum("task", skipna=False)
