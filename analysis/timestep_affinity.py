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
  deviation 2 |d_k|^2 sqrt(q_k), where q_k = mean_l cos^2(d_k, d_l) comes from the noise of the other timesteps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import ReportFigure
from analysis.plots.style import DIVERGING, axes_or_new

_SIGNAL_ERRORS = 2.0
"""Below so many standard deviations of noise a gradient's direction is not shown, as in `conflict`."""
_PARTS = 16
_MAX_TICKS = 9

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
          latter by a jackknife over 16 parts of the sketch. What the projection adds to pure noise is in both, so
          their root of squares is no less than the whole error.

        Attributes ``sampling_error`` and ``sketch_error``: the same over all defined pairs.

    Raises:
        ValueError: If there are not two halves, or fewer than two timesteps.
    """
    if sketches.ndim != 3 or len(sketches) != 2 or sketches.shape[1] < 2:
        raise ValueError(f"sketches must be (2, T, D) with T at least 2, got {sketches.shape}")
    first, second = np.nan_to_num(sketches.astype(np.float64))
    measured = np.isfinite(sketches).all(axis=(0, 2))
    mean, half_difference = (first + second) / 2, (first - second) / 2
    products = mean @ mean.T
    squared_norm = (first * second).sum(1)
    noise = (half_difference**2).sum(1)
    signal = _signal(squared_norm, noise, half_difference, measured)
    distinct = measured & (signal > _SIGNAL_ERRORS)
    defined = distinct[:, None] & distinct
    cosine = _ratio(products, squared_norm)
    off_diagonal = defined & ~np.eye(len(mean), dtype=bool)
    sampling = _sampling_variance(mean, half_difference, cosine, squared_norm)
    projection = _jackknife_variance(mean, first, second, products, squared_norm)
    np.fill_diagonal(cosine, 1.0)
    plain = _ratio(products, np.where(measured, np.diagonal(products), np.nan))
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


def _signal(
    squared_norm: FloatArray, noise: FloatArray, half_difference: FloatArray, measured: npt.NDArray[np.bool_]
) -> FloatArray:
    """<a_k, b_k> in standard deviations of what noise alone would give; NaN where nothing was measured."""
    norm = np.sqrt(noise)
    unit = half_difference / np.where(norm > 0, norm, 1.0)[:, None]
    alike = (unit @ unit.T) ** 2
    np.fill_diagonal(alike, 0.0)
    others = measured.sum() - 1
    deviation = 2 * noise * np.sqrt(alike[:, measured].sum(1) / max(others, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(measured, squared_norm / deviation, np.nan)


def _sampling_variance(
    mean: FloatArray, half_difference: FloatArray, cosine: FloatArray, squared_norm: FloatArray
) -> FloatArray:
    """Estimated sampling variance of each cosine (T, T), to first order in the noise of its denominators.

    The noise of g_l turns the cosine by its part along m_k / |g_k| - cosine m_l / |g_l|; d_l stands for it. Estimates
    for one pair may be negative; only means over many pairs are of use.
    """
    cross = _ratio(mean @ half_difference.T, squared_norm)
    pure = _ratio(half_difference @ half_difference.T, squared_norm)
    turned = cross - cosine * np.diagonal(cross)
    return turned**2 + (turned**2).T - pure**2


def _jackknife_variance(
    mean: FloatArray, first: FloatArray, second: FloatArray, products: FloatArray, squared_norm: FloatArray
) -> FloatArray:
    """Variance of each cosine (T, T) over random projections: jackknife over parts of the sketch's D numbers.

    The numbers of a sketch are alike and nearly independent, as draws would be. Where D exceeds the size of a layer
    they are fewer than D in effect, and the variance comes out too large, not too small.
    """
    parts = np.array_split(np.arange(mean.shape[1]), min(_PARTS, mean.shape[1]))
    total, total_sq = np.zeros_like(products), np.zeros_like(products)
    for part in parts:
        without = _ratio(
            products - mean[:, part] @ mean[:, part].T, squared_norm - (first[:, part] * second[:, part]).sum(1)
        )
        total += without
        total_sq += without**2
    count = len(parts)
    return (count - 1) / count * (total_sq - total**2 / count)


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


def plot_timestep_affinity(
    cosine: xr.DataArray, *, title: str = "", colorbar: bool = True, ax: Axes | None = None
) -> Axes:
    """Draws cosines between timesteps: blue agrees, red conflicts, grey is undefined; log-SNR at the top and right.

    Args:
        cosine: (timestep, other_timestep), with the coordinate ``log_snr`` on ``timestep``.
        title: Of the panel.
        colorbar: Whether to draw the scale.
        ax: Where to draw.
    """
    ax = axes_or_new(ax)
    ax.set_facecolor("#c4c4c4")
    image = ax.imshow(cosine.values, cmap=DIVERGING, vmin=-1.0, vmax=1.0, interpolation="nearest")
    at = np.unique(np.linspace(0, cosine.sizes["timestep"] - 1, _MAX_TICKS).astype(int))
    labels = [str(t) for t in cosine["timestep"].values[at]]
    ax.set_xticks(at, labels, fontsize=8)
    ax.set_yticks(at, labels, fontsize=8)
    ax.set_xlabel("timestep t  (noise increases →)")
    ax.set_ylabel("timestep t")
    top = ax.secondary_xaxis("top")
    top.set_xticks(at, [f"{value:.1f}" for value in cosine["log_snr"].values[at]], fontsize=7)
    top.set_xlabel("log-SNR", fontsize=8)
    ax.set_title(title)
    if colorbar:
        ax.figure.colorbar(image, ax=ax, shrink=0.85, pad=0.02)
    return ax


def timestep_affinity_figure(affinity: xr.Dataset) -> ReportFigure:
    """The plain and the corrected matrix beside each other.

    Args:
        affinity: From `timestep_affinity`.
    """
    figure = Figure(figsize=(11.0, 5.2), layout="compressed")
    axes = figure.subplots(1, 2)
    plot_timestep_affinity(
        affinity["plain_cosine"].assign_coords(log_snr=affinity["log_snr"]),
        title="plain",
        colorbar=False,
        ax=axes[0],
    )
    plot_timestep_affinity(affinity["cosine"], title="noise-corrected", ax=axes[1])
    axes[1].set_ylabel("")
    return ReportFigure(
        "timestep_affinity",
        "Affinity between single timesteps",
        "Cosine between the gradients of the losses at single timesteps. Noise draws the plain cosine (left) towards "
        "zero; the corrected one (right) is free of that and may exceed 1. Grey: a gradient that cannot be told from "
        f"noise. Standard error of a corrected cosine: {affinity.attrs['sampling_error']:.3f} from sampling, "
        f"{affinity.attrs['sketch_error']:.3f} from the projection to {affinity.attrs['width']} numbers.",
        figure,
    )
