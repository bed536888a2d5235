"""How close samples are to real data, from features (N, D) of both: Frechet and kernel distances, precision, recall.

Any features will do: the pixels themselves, or those of a network; numbers from different features, or from different
numbers of samples, cannot be compared. Everything is computed in float64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

FloatArray = npt.NDArray[np.float64]

_AT_ONCE = 1024
"""Rows of a matrix of distances that are held at a time."""


def frechet_distance(samples: npt.ArrayLike, real: npt.ArrayLike) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Sources: Dowson and Landau, Journal of Multivariate Analysis 12, 1982, equation 4; on Inception features it is the
    FID (Heusel et al., NeurIPS 2017). Covariances are the unbiased ones, and may be singular.

    The estimate is biased upwards: two sets from one distribution are at a positive distance, about `frechet_bias`,
    which falls as 1/N. So compare only numbers from equally many samples (Chong and Forsyth, CVPR 2020).

    Args:
        samples: (N, D) features of samples.
        real: (M, D) features of real data.

    Returns:
        The distance in squared units of the features, at least 0.

    Raises:
        ValueError: If the arrays do not fit, hold numbers that are not finite, or have fewer than two rows.
    """
    first, second = _features(samples, real, least=2)
    difference = first.mean(axis=0) - second.mean(axis=0)
    one, other = _factor(first), _factor(second)
    # tr (C1 C2)^(1/2) is the sum of the singular values of F1 F2^T, where C = F^T F: no root of a rounded product.
    overlap = np.linalg.svd(one @ other.T, compute_uv=False).sum()
    return max(0.0, float(difference @ difference + (one**2).sum() + (other**2).sum() - 2 * overlap))


def frechet_bias(real: npt.ArrayLike, count: int, real_count: int | None = None) -> float:
    """About what `frechet_distance` gives for ``count`` perfect samples: its bias, to first order in 1/N.

    For Gaussian features with covariance eigenvalues l: (1/N + 1/M) (sum_i l_i + sum_ij l_i l_j (1 + [i = j]) /
    (2 (l_i + l_j))). The first sum comes from the means, the second from the covariances (the distance's second
    derivative, times the variances of a Wishart matrix). Features that are no Gaussian have another second sum.

    Args:
        real: (M, D) features that stand for the distribution.
        count: N.
        real_count: Real features that samples are compared with, if not M.

    Raises:
        ValueError: As `frechet_distance`, and if a count is below 2.
    """
    (features,) = _features(real, least=2)
    sizes = count, len(features) if real_count is None else real_count
    if min(sizes) < 2:
        raise ValueError(f"a covariance takes two samples at least, got counts of {sizes}")
    values = np.linalg.svd(_factor(features), compute_uv=False) ** 2
    together = values[:, None] + values
    pairs = np.divide(np.multiply.outer(values, values), 2 * together, out=np.zeros_like(together), where=together > 0)
    return float((1 / sizes[0] + 1 / sizes[1]) * (values.sum() + pairs.sum() + np.trace(pairs)))


def kernel_distance(samples: npt.ArrayLike, real: npt.ArrayLike) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, by its unbiased estimator.

    Source: Binkowski et al., "Demystifying MMD GANs", ICLR 2018, section 4 (the KID), from Gretton et al., JMLR 13,
    2012, equation 3. Unbiased at any number of samples, so that it may come out below 0 where there is no difference.

    Args:
        samples: (N, D) features of samples.
        real: (M, D) features of real data.

    Raises:
        ValueError: As `frechet_distance`.
    """
    first, second = _features(samples, real, least=2)
    within = [_kernel_sum(own, own, skip_diagonal=True) / (len(own) * (len(own) - 1)) for own in (first, second)]
    return sum(within) - 2 * _kernel_sum(first, second) / (len(first) * len(second))


def precision_recall(samples: npt.ArrayLike, real: npt.ArrayLike, neighbours: int = 3) -> tuple[float, float]:
    """Share of samples on the real data's manifold, and of real data on the samples'.

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019,
    equations 1 and 2: the manifold of a set is the union of balls around its members, each reaching to its k-th
    nearest neighbour in the set. Both numbers depend on the sizes of the sets (a smaller set has larger balls).

    Args:
        samples: (N, D) features of samples.
        real: (M, D) features of real data.
        neighbours: k; 3 in the paper.

    Returns:
        Precision and recall, each from 0 to 1.

    Raises:
        ValueError: If the arrays do not fit, hold numbers that are not finite, or have no k neighbours.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    first, second = _features(samples, real, least=neighbours + 1)
    return _share_inside(first, second, neighbours), _share_inside(second, first, neighbours)


def _features(*sets: npt.ArrayLike, least: int) -> list[FloatArray]:
    arrays = [np.asarray(each, dtype=np.float64) for each in sets]
    shapes = [array.shape for array in arrays]
    if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        raise ValueError(f"features must be (N, D) with one D, got shapes {shapes}")
    if min(shape[0] for shape in shapes) < least:
        raise ValueError(f"{least} rows at least are needed, got shapes {shapes}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("features hold NaN or infinite numbers")
    return arrays


def _factor(features: FloatArray) -> FloatArray:
    """F (min(N, D), D) with F^T F the unbiased covariance (D, D)."""
    centred = features - features.mean(axis=0)
    return np.asarray(np.linalg.qr(centred / np.sqrt(len(features) - 1), mode="r"))


def _kernel_sum(rows: FloatArray, columns: FloatArray, *, skip_diagonal: bool = False) -> float:
    total, dimension = 0.0, rows.shape[1]
    for start in range(0, len(rows), _AT_ONCE):
        total += float(((rows[start : start + _AT_ONCE] @ columns.T / dimension + 1) ** 3).sum())
    if skip_diagonal:
        total -= float((((rows * rows).sum(axis=1) / dimension + 1) ** 3).sum())
    return total


def _share_inside(points: FloatArray, manifold: FloatArray, neighbours: int) -> float:
    """Share of points within the distance of a member of the manifold to its k-th neighbour, of that member."""
    radii = np.concatenate(
        [
            np.partition(cdist(manifold[start : start + _AT_ONCE], manifold), neighbours, axis=1)[:, neighbours]
            for start in range(0, len(manifold), _AT_ONCE)
        ]
    )  # the nearest of all is the member itself
    inside = [
        (cdist(points[start : start + _AT_ONCE], manifold) <= radii).any(axis=1)
        for start in range(0, len(points), _AT_ONCE)
    ]
    return float(np.concatenate(inside).mean())
