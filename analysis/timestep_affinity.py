"""Affinity between single timesteps: cosines of their gradients, from sketches of two independent halves.

Notation: a_k and b_k are the sketches of timestep k's gradient in two halves with different images and noise, m_k =
(a_k + b_k) / 2 their mean and d_k = (a_k - b_k) / 2. The signal cancels in d_k, so d_k has the noise of m_k and nothing
else. With so few samples for each of T timesteps, noise dominates; hence

- <m_k, m_l> for k != l and <a_k, b_k> = |m_k|^2 - |d_k|^2 estimate <g_k, g_l> and |g_k|^2 without bias;
- <m_k, d_l>^2 + <d_k, m_l>^2 - <d_k, d_l>^2 estimates the sampling variance of <m_k, m_l>: for independent noise the
  three have the expectations g_k' S_l g_k + tr(S_k S_l), g_l' S_k g_l + tr(S_k S_l) and tr(S_k S_l), with S the
  covariance of m. One such estimate is very noisy, their mean over all pairs of a timestep is not. Likewise
  4 <m_k, d_k>^2 estimates the variance of <a_k, b_k>;
- a gradient counts as distinct from noise by what noise alone would do: <a_k, b_k> would then have the standard
  deviation 2 n sqrt(q), with n the mean of |d_l|^2 and q that of cos^2(d_l, d_l') over neighbouring timesteps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr

_SIGNAL_DEVIATIONS = 3.0
"""A gradient's direction is shown if its signal exceeds so many standard deviations of noise alone. At two, as for a
handful of intervals, dozens of a thousand timesteps would pass by chance."""
_NEIGHBOURS = 8
"""Timesteps on each side whose noise stands for a timestep's own: near enough to be alike, enough for a mean."""

FloatArray = npt.NDArray[np.float64]


def timestep_affinity(
    sketches: npt.NDArray[np.floating], timesteps: npt.NDArray[np.integer], log_snr: npt.NDArray[np.floating]
) -> xr.Dataset:
    """Cosines between the gradients of timesteps, corrected for sampling noise, with both their errors.

    Args:
        sketches: (2, T, D) sketches of each timestep's gradient in two independent halves; NaN where nothing was
            measured. Exact gradients do as well: then ``sketch_error`` means nothing.
        timesteps: (T,) the timesteps.
        log_snr: (T,) their log signal-to-noise ratios.

    Returns:
        Dataset over ``timestep`` and ``other_timestep``:

        - ``cosine``: <m_k, m_l> / sqrt(<a_k, b_k> <a_l, b_l>), 1 on the diagonal, not clipped. NaN where one of the
          gradients is not distinct from noise or was not measured.
        - ``plain_cosine``: cos(m_k, m_l), which noise draws to zero.
        - ``squared_norm`` (timestep): <a_k, b_k>, unbiased for |g_k|^2. ``noise`` (timestep): |d_k|^2, the part of
          |m_k|^2 that is noise. ``signal`` (timestep): the former in standard deviations of noise alone.
        - ``sampling_error``, ``sketch_error`` (timestep): root mean square over the other timesteps of the standard
          error of ``cosine``, from the images, noise and labels drawn, and from the projection to D numbers. The
          latter is what theory gives for these gradients. What the projection adds to pure noise is in both, so
          their root of squares is no less than the whole error.

        Attributes ``sampling_error`` and ``sketch_error``: the same over all defined pairs.

    Raises:
        ValueError: If there are not two halves, or fewer than two timesteps.
    """
    if sketches.ndim != 3 or len(sketches) != 2 or sketches.shape[1] < 2:
        raise ValueError(f"sketches must be (2, T, D) with T at least 2, got {sketches.shape}")
    measured = np.isfinite(sketches).all(axis=(0, 2))
    half = _half_products(np.nan_to_num(sketches.astype(np.float64)))
    squared_norm = np.diagonal(half.ab)
    mean = (half.aa + half.bb + half.ab + half.ab.T) / 4
    difference = (half.aa + half.bb - half.ab - half.ab.T) / 4
    noise = np.diagonal(difference)
    signal = _signal(squared_norm, difference, measured)
    distinct = measured & (signal > _SIGNAL_DEVIATIONS)
    defined = distinct[:, None] & distinct
    off_diagonal = defined & ~np.eye(len(mean), dtype=bool)
    cosine = _ratio(mean, squared_norm)
    sampling = _sampling_variance(half, cosine, difference)
    projection = _projection_variance(half, cosine, mean) / sketches.shape[2]
    np.fill_diagonal(cosine, 1.0)
    plain = _ratio(mean, np.where(measured, np.diagonal(mean), np.nan))
    pair, single = ("timestep", "other_timestep"), ("timestep",)
    return xr.Dataset(
        {
            "cosine": (pair, np.where(defined, cosine, np.nan).astype(np.float32)),
            "plain_cosine": (pair, plain.astype(np.float32)),
            "squared_norm": (single, np.where(measured, squared_norm, np.nan)),
            "noise": (single, np.where(measured, noise, np.nan)),
            "signal": (single, signal),
            "sampling_error": (single, _root_mean(sampling, off_diagonal, axis=1)),
            "sketch_error": (single, _root_mean(projection, off_diagonal, axis=1)),
        },
        coords={
            "timestep": timesteps,
            "other_timestep": timesteps,
            "log_snr": ("timestep", np.asarray(log_snr, dtype=float)),
        },
        attrs={
            "sampling_error": float(_root_mean(sampling, off_diagonal)),
            "sketch_error": float(_root_mean(projection, off_diagonal)),
            "width": int(sketches.shape[2]),
        },
    )


class _HalfProducts(NamedTuple):
    """Inner products of the halves, each (T, T): <a_k, a_l>, <b_k, b_l> and <a_k, b_l>."""

    aa: FloatArray
    bb: FloatArray
    ab: FloatArray


def _half_products(halves: FloatArray) -> _HalfProducts:
    first, second = halves
    return _HalfProducts(first @ first.T, second @ second.T, first @ second.T)


def _signal(squared_norm: FloatArray, difference: FloatArray, measured: npt.NDArray[np.bool_]) -> FloatArray:
    """<a_k, b_k> in standard deviations of what noise alone would give, from <d_k, d_l>; NaN if not measured.

    A timestep's own |d_k|^2 would not do: where it is small by chance, <a_k, b_k> = |m_k|^2 - |d_k|^2 is large.
    """
    noise = np.diagonal(difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        alike = _ratio(difference, noise) ** 2
    np.fill_diagonal(alike, np.nan)
    signal = np.full(len(noise), np.nan)
    for k in np.flatnonzero(measured).tolist():
        near = np.arange(max(k - _NEIGHBOURS, 0), min(k + _NEIGHBOURS + 1, len(noise)))
        near = near[measured[near] & (noise[near] > 0)]
        if len(near) > 1:
            signal[k] = squared_norm[k] / (2 * noise[near].mean() * np.sqrt(np.nanmean(alike[np.ix_(near, near)])))
    return signal


def _sampling_variance(half: _HalfProducts, cosine: FloatArray, difference: FloatArray) -> FloatArray:
    """Estimated sampling variance of each cosine (T, T), to first order in the noise of its denominators.

    The noise of g_l turns the cosine by its part along m_k / |g_k| - cosine m_l / |g_l|; d_l stands for it. Estimates
    for one pair may be negative; only means over many pairs are of use.
    """
    squared_norm = np.diagonal(half.ab)
    cross = _ratio((half.aa - half.ab + half.ab.T - half.bb) / 4, squared_norm)  # <m_k, d_l>
    turned = cross - cosine * np.diagonal(cross)
    return turned**2 + (turned**2).T - _ratio(difference, squared_norm) ** 2


def _projection_variance(half: _HalfProducts, cosine: FloatArray, mean: FloatArray) -> FloatArray:
    """D times the variance of each cosine (T, T) over random projections, to first order.

    For a dense Gaussian projection cov(<Su, Sv>, <Sw, Sz>) = (<u, w> <v, z> + <u, z> <v, w>) / D (Isserlis). The
    count sketch has the same covariances less the terms of coordinates that cannot collide (see
    `lightning_modules.gradients.sketch`). How its buckets differ among each other says nothing: where few coordinates
    carry most of a gradient, buckets are very unlike although their sum hardly errs.
    """
    norm = np.diagonal(half.ab)
    along_first, along_second = (half.aa + half.ab.T) / 2, (half.ab + half.bb) / 2  # <m_l, a_k>, <m_l, b_k> at [l, k]
    numerator = np.outer(np.diagonal(mean), np.diagonal(mean)) + mean**2
    denominator = np.diagonal(half.aa) * np.diagonal(half.bb) + norm**2
    both = np.diagonal(along_first) * along_second + np.diagonal(along_second) * along_first  # numerator with norm k
    with np.errstate(divide="ignore", invalid="ignore"):
        single = denominator / norm**2
        joint = (half.aa * half.bb + half.ab * half.ab.T) / np.outer(norm, norm)
        shared = _ratio(both / norm, norm)
        return (
            _ratio(_ratio(numerator, norm), norm)
            + cosine**2 / 4 * (single[:, None] + single + 2 * joint)
            - cosine * (shared + shared.T)
        )


def _ratio(products: FloatArray, squared_norm: FloatArray) -> FloatArray:
    """products_kl / sqrt(norm_k norm_l); NaN where a squared norm is not positive."""
    norm = np.sqrt(np.where(squared_norm > 0, squared_norm, np.nan))
    return products / np.outer(norm, norm)


def _root_mean(variance: FloatArray, where: npt.NDArray[np.bool_], axis: int | None = None) -> FloatArray:
    """Root of the mean variance over the pairs chosen; NaN where there are none."""
    chosen = where & np.isfinite(variance)
    count = chosen.sum(axis=axis)
    total = np.where(chosen, variance, 0.0).sum(axis=axis)
    return np.where(count > 0, np.sqrt(np.maximum(total, 0.0) / np.maximum(count, 1)), np.nan)
