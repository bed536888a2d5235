"""How far the gradients of two tasks agree: cosines, magnitudes, and what PCGrad makes of them.

`moments` explains the notation and why the plain cosine is drawn towards zero by noise. Here every function takes a
Gramian (gradient_step, ..., task, half, other_task, other_half) with sample counts (gradient_step, task, half), at any
level of `gramians.sum_layers`, and returns a Dataset with the statistic, its ``standard_error`` (`jackknife` says what
``errors`` means) and the number of ``units`` behind it as an attribute. Where a squared norm cannot be told from zero
the statistic is undefined, NaN: that is not a cosine of zero.

Conflict is also in `significance` (z-scores, rates), `noise` (noise scales), `update` (shares), `moments`, `jackknife`.
"""

from __future__ import annotations

import xarray as xr

from analysis.jackknife import Errors, PooledProbes, pool_probes
from analysis.moments import as_other, diagonal


def cosine(gramian: xr.DataArray) -> xr.DataArray:
    """cos φ_kl = G_kl / √(G_kk G_ll) of a task Gramian (..., task, other_task), not corrected for noise.

    Source: PCGrad (arXiv 2001.06782), definition 1, calls two tasks conflicting where it is negative.
    """
    return _over_norms(gramian, diagonal(gramian))


def plain_cosine(gramian: xr.DataArray, count: xr.DataArray, *, errors: Errors = "probes") -> xr.Dataset:
    """`cosine` of the averaged task Gramian, mean_s G_kl / √(mean_s G_kk · mean_s G_ll): what is usually reported.

    Noise draws it towards zero by the ``attenuation`` of `corrected_cosine`. Its sign is that of the corrected cosine,
    and it needs no halves.

    Returns:
        ``cosine`` and ``standard_error`` (..., task, other_task).
    """
    pool = pool_probes(gramian, count, halved=False)
    return pool.estimate("cosine", lambda means: cosine(means["product"]), errors)


def corrected_cosine(gramian: xr.DataArray, count: xr.DataArray, *, errors: Errors = "probes") -> xr.Dataset:
    """Noise-corrected cosine: mean_s G_kl / √(mean_s |g_k|² · mean_s |g_l|²), with unbiased squared norms.

    Source: Spearman's correction for attenuation (American Journal of Psychology 15, 1904), numerators and denominators
    averaged over probes before dividing. Values are not clipped: beyond 1 they show what the error says. Averages over
    probes weigh each by its gradients' size.

    Returns:
        ``cosine`` and ``standard_error`` (..., task, other_task), the diagonal 1 ± 0 by definition; ``signal``
        (..., task): mean |g_k|² in units of its standard error over probes, a cosine being defined where both tasks'
        exceed `jackknife.signal_threshold`; and ``attenuation`` (..., task, other_task): the factor
        √(mean |g_k|² mean |g_l|² / (mean G_kk mean G_ll)) by which the plain cosine is smaller, NaN on the diagonal.

    Raises:
        ValueError: If the tasks were not measured in halves.
    """
    pool = pool_probes(gramian, count)
    found = pool.estimate("cosine", lambda means: _over_norms(means["product"], means["squared_norm"]), errors)
    signal = pool.signal(_squared_norm)
    defined = _both(pool.stands_out(signal))
    same = as_other(found["task"]) == found["task"]
    found["cosine"] = found["cosine"].where(~same, 1.0).where(defined)
    found["standard_error"] = found["standard_error"].where(~same, 0.0).where(defined)
    found["signal"] = signal
    share = pool.means["squared_norm"] / diagonal(pool.means["product"])
    share = share.where(share > 0)
    found["attenuation"] = (share * as_other(share)).where(defined & ~same) ** 0.5
    return found


def magnitude_similarity(gramian: xr.DataArray, count: xr.DataArray, *, errors: Errors = "probes") -> xr.Dataset:
    """Φ_kl = 2 |g_k| |g_l| / (|g_k|² + |g_l|²), noise-corrected: 1 for equal norms, near 0 for very unequal ones.

    Source: PCGrad (arXiv 2001.06782), definition 2, here of the averages over probes of unbiased squared norms. Plain
    norms hold noise, which makes tasks with equal noise look alike.

    Returns:
        ``similarity`` and ``standard_error`` (..., task, other_task), NaN where a norm cannot be told from zero. Near
        1, its maximum, the error of the estimate is not normal.
    """
    pool = pool_probes(gramian, count)
    return _defined(pool.estimate("similarity", _magnitude_similarity, errors), pool)


def curvature_bound(gramian: xr.DataArray, count: xr.DataArray, *, errors: Errors = "probes") -> xr.Dataset:
    """ξ_kl = (1 - cos² φ_kl) |g_k - g_l|² / |g_k + g_l|², PCGrad's multi-task curvature bounding measure.

    It is the squared length of PCGrad's update of the two tasks over the plain one's, |g_k' + g_l'|² / |g_k + g_l|²
    with each gradient projected onto the normal plane of the other.

    Source: PCGrad (arXiv 2001.06782), theorem 2: a PCGrad step of two tasks ends no higher than a plain one if
    (a) cos φ <= -Φ, (b) the curvature along the step is at least ξ times the gradient's Lipschitz constant, times the
    squared gradient, and (c) the step is long enough. The Gramian decides (a) and says how demanding (b) is: with
    ξ above 1 no function meets it.

    Returns:
        ``bound`` and ``standard_error`` (..., task, other_task), NaN on the diagonal and where a norm or |g_k + g_l|²
        cannot be told from zero; ``destructive`` (..., task, other_task): whether (a) holds for the estimates.
    """
    pool = pool_probes(gramian, count)

    def bound(means: xr.Dataset) -> xr.DataArray:
        cos = _over_norms(means["product"], means["squared_norm"])
        total = _sum_of_norms(means)
        return (1 - cos**2) * (total - 2 * means["product"]) / (total + 2 * means["product"])

    found = _defined(pool.estimate("bound", bound, errors), pool)
    sum_is_known = pool.is_positive(lambda means: _sum_of_norms(means) + 2 * means["product"])
    different = as_other(found["task"]) != found["task"]
    found = found.where(sum_is_known & different).assign_attrs(found.attrs)
    cos = _over_norms(pool.means["product"], pool.means["squared_norm"])
    defined = _both(pool.is_positive(_squared_norm))
    found["destructive"] = (cos <= -_magnitude_similarity(pool.means)) & defined & different
    return found


def _squared_norm(means: xr.Dataset) -> xr.DataArray:
    return means["squared_norm"]


def _sum_of_norms(means: xr.Dataset) -> xr.DataArray:
    return means["squared_norm"] + as_other(means["squared_norm"])


def _magnitude_similarity(means: xr.Dataset) -> xr.DataArray:
    positive = means["squared_norm"].where(means["squared_norm"] > 0)
    return 2 * (positive * as_other(positive)) ** 0.5 / (positive + as_other(positive))


def _over_norms(products: xr.DataArray, squared_norms: xr.DataArray) -> xr.DataArray:
    norm = squared_norms.where(squared_norms > 0) ** 0.5
    return products / (norm * as_other(norm))


def _both(known: xr.DataArray) -> xr.DataArray:
    return known & as_other(known)


def _defined(found: xr.Dataset, pool: PooledProbes) -> xr.Dataset:
    """NaN where a task's squared norm cannot be told from zero."""
    return found.where(_both(pool.is_positive(_squared_norm))).assign_attrs(found.attrs)
