"""Gradients of single samples with known means and covariances, averaged in groups of uneven size.

`simulated` draws many independent copies of the same experiment, one per ``layer``: all statistics treat layers apart,
so one call gives the whole distribution of an estimate.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis.gramians import gramian_arrays

WIDTH = 16
HALVES = 2
NORMS = np.array([1.0, 1.6, 0.7, 1.2])
COSINES = np.array(
    [
        [1.0, 0.6, -0.3, 0.0],
        [0.6, 1.0, 0.1, 0.4],
        [-0.3, 0.1, 1.0, -0.4],
        [0.0, 0.4, -0.4, 1.0],
    ]
)
K = len(NORMS)
GRAM = COSINES * np.outer(NORMS, NORMS)
"""<g_k, g_l> of the true gradients."""
TRACES = np.array([20.0, 30.0, 10.0, 14.0])
"""tr(Σ_k) of one sample's gradient."""
MEAN_COUNT = 7.0
"""Samples of a group on average; they vary from 3 to 11."""
ABOVE = np.triu_indices(K, 1)
BOUNDS = [0, 10, 30, 60, 100]


def true_gradients(gram: np.ndarray = GRAM) -> np.ndarray:
    """(K, WIDTH) vectors with these inner products."""
    values, vectors = np.linalg.eigh(gram)
    return np.pad(vectors * np.sqrt(np.maximum(values, 0.0)), ((0, 0), (0, WIDTH - len(gram))))


def spreads(traces: np.ndarray = TRACES) -> np.ndarray:
    """(K, WIDTH) standard deviations by coordinate, unequal, with these sums of squares."""
    shape = np.linspace(2.0, 0.5, WIDTH) * np.ones((len(traces), 1))
    return np.sqrt(traces[:, None] * shape / shape.sum(-1, keepdims=True))


def simulated(
    steps: int,
    copies: int,
    *,
    means: np.ndarray | None = None,
    traces: np.ndarray = TRACES,
    seed: int = 0,
) -> xr.Dataset:
    """Gramians of independent probes of independent experiments.

    Args:
        steps: Probes S.
        copies: Experiments, the ``layer`` dimension.
        means: True gradients (K, WIDTH), or (S, copies, K, WIDTH) to let them vary.
        traces: tr(Σ_k), (K).
        seed: Of the generator.

    Returns:
        As of `gramian_arrays`; the noise of a sample is skewed (exponential), not Gaussian.
    """
    rng = np.random.default_rng(seed)
    means = true_gradients() if means is None else means
    tasks = means.shape[-2]
    scale = spreads(traces)
    counts = rng.integers(3, 12, (steps, tasks * HALVES))
    values = np.empty((steps, copies, tasks * HALVES, tasks * HALVES))
    for step in range(steps):
        groups = []
        for group, samples in enumerate(counts[step]):
            mean = means[group // HALVES] if means.ndim == 2 else means[step, :, group // HALVES]
            noise = rng.exponential(size=(copies, samples, WIDTH)) - 1.0
            groups.append(mean + scale[group // HALVES] * noise.mean(1))
        gradients = np.stack(groups, axis=1)
        values[step] = gradients @ gradients.swapaxes(-1, -2)
    bounds = BOUNDS if tasks == K else range(tasks + 1)
    return gramian_arrays(values, counts, layers=[f"copy{i}" for i in range(copies)], halves=HALVES, bounds=bounds)


def covered(found: xr.Dataset, name: str, truth: np.ndarray, half_width: xr.DataArray) -> float:
    """Share of copies (and cells) whose interval holds the truth; all must be defined."""
    assert found[name].notnull().all()
    return float((np.abs(found[name] - truth) <= half_width).mean())
