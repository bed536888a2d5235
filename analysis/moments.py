"""What one probe says about its tasks, free of sampling noise: products, squared norms, traces.

Notation: g_k is the gradient of task k's mean loss, ĝ_kh its estimate from the n_kh samples of half h, ĝ_k the mean
over the n_k samples of all halves, and Σ_k the covariance of one sample's gradient. Tasks and halves use disjoint
samples, so products of different groups are unbiased, E <ĝ_kh, ĝ_lh'> = <g_k, g_l>, but a group's product with itself
holds its noise, E |ĝ_k|² = |g_k|² + tr(Σ_k)/n_k. With noise of a thousand times the squared gradient and 16 samples, a
plain cosine is 60 times too small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import xarray as xr

from analysis.gramians import STEP

FloatArray = npt.NDArray[np.float64]
MOMENTS = ("product", "squared_norm", "trace")
_CHUNK_BYTES = 2**22


def probe_moments(gramian: xr.DataArray, count: xr.DataArray) -> xr.Dataset:
    """The statistics of each probe from which everything else follows; all are linear in the Gramian.

    Args:
        gramian: (gradient_step, ..., task, half, other_task, other_half).
        count: (gradient_step, task, half) samples.

    Returns:
        Dataset of float64, NaN where a task had no samples, the latter two also where fewer than two halves had any:

        - ``product`` (gradient_step, ..., task, other_task): <ĝ_k, ĝ_l>, off the diagonal an unbiased <g_k, g_l>. Its
          diagonal |ĝ_k|² holds noise.
        - ``squared_norm`` (gradient_step, ..., task): Σ_{h≠h'} n_kh n_kh' <ĝ_kh, ĝ_kh'> / Σ_{h≠h'} n_kh n_kh', an
          unbiased |g_k|². It can be negative. For two halves it is the split-half product of Spearman's correction for
          attenuation (1904), and McCandlish et al.'s |G|² (arXiv 1812.06162, appendix A.1).
        - ``trace`` (gradient_step, ..., task): (Σ_h n_kh |ĝ_kh|² - n_k |ĝ_k|²) / (halves - 1), an unbiased tr(Σ_k): the
          analysis of variance between halves.
    """
    values, counts, lead = plain_arrays(gramian, count)
    found = moments_of(values, counts)
    shape = [gramian.sizes[dim] for dim in (STEP, *lead)]
    return xr.Dataset(
        {
            name: labelled(array.reshape(*shape, *array.shape[2:]), (STEP, *lead), gramian)
            for name, array in zip(MOMENTS, found, strict=True)
        }
    )


def task_gramian(gramian: xr.DataArray, count: xr.DataArray) -> xr.DataArray:
    """G_kl of the tasks' mean losses, ``product`` of `probe_moments`: (gradient_step, ..., task, other_task)."""
    values, counts, lead = plain_arrays(gramian, count)
    products = products_of(values, counts)
    shape = [gramian.sizes[dim] for dim in (STEP, *lead)]
    return labelled(products.reshape(*shape, *products.shape[2:]), (STEP, *lead), gramian).rename("product")


def products_of(values: npt.NDArray[np.floating], counts: npt.NDArray) -> FloatArray:
    """`task_gramian` of plain arrays: (S, M, K, H, K, H) and (S, K, H) -> (S, M, K, K)."""
    total = counts.sum(-1)
    weight = counts / np.where(total > 0, total, 1)[..., None]
    product = np.zeros((*values.shape[:3], values.shape[2]))
    for half, other in itertools.product(range(counts.shape[-1]), repeat=2):
        both = (weight[:, :, None, half] * weight[:, None, :, other])[:, None]
        block = values[:, :, :, half, :, other]
        # A group without samples may hold anything, NaN included.
        product += both * (block if both.all() else np.where(both > 0, block, 0.0))
    empty = total == 0
    if empty.any():
        product[np.broadcast_to((empty[:, :, None] | empty[:, None, :])[:, None], product.shape)] = np.nan
    return product


def moments_of(values: npt.NDArray[np.floating], counts: npt.NDArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """`probe_moments` of plain arrays.

    Args:
        values: (S, M, K, H, K, H).
        counts: (S, K, H).

    Returns:
        Products (S, M, K, K), squared norms and traces (S, M, K).
    """
    halves = counts.shape[-1]
    total = counts.sum(-1)
    product = products_of(values, counts)
    own = np.einsum("smkhkg->smkhg", values)
    pairs = counts[..., :, None] * counts[..., None, :] * (1.0 - np.eye(halves))
    pair_total = pairs.sum((-1, -2))
    usable = pair_total > 0
    pairs = np.where(usable[..., None, None], pairs / np.where(usable, pair_total, 1)[..., None, None], np.nan)
    norm = np.where(pairs[:, None] == 0, 0.0, own * pairs[:, None]).sum((-1, -2))
    squares = np.where(counts[:, None] > 0, np.einsum("smkhh->smkh", own) * counts[:, None], 0.0).sum(-1)
    between = squares - total[:, None] * np.einsum("smkk->smk", product)
    freedom = (counts > 0).sum(-1) - 1.0
    trace = between / np.where(freedom > 0, freedom, np.nan)[:, None]
    return product, norm, trace


def plain_arrays(
    gramian: xr.DataArray, count: xr.DataArray
) -> tuple[npt.NDArray[np.floating], npt.NDArray, tuple[str, ...]]:
    """The Gramian as (S, M, K, H, K, H) with all other dimensions flattened to M, the counts (S, K, H), their names."""
    groups = ("task", "half", "other_task", "other_half")
    lead = tuple(str(dim) for dim in gramian.dims if dim not in (STEP, *groups))
    values = gramian.transpose(STEP, *lead, *groups).values
    counts = count.transpose(STEP, "task", "half").values
    if len(counts) != len(values):
        raise ValueError(f"Gramians of {len(values)} probes, but sample counts of {len(counts)}")
    return values.reshape(len(values), -1, *values.shape[-4:]), counts, lead


def probe_chunks(values: npt.NDArray[np.floating]) -> Iterator[slice]:
    """Pieces of the probes (S, ...) that take a few megabytes each in float64, so that they stay in the cache."""
    at_once = max(1, _CHUNK_BYTES // (8 * values[0].size))
    for start in range(0, len(values), at_once):
        yield slice(start, start + at_once)


def labelled(values: npt.NDArray, lead: tuple[str, ...], gramian: xr.DataArray) -> xr.DataArray:
    """An array (lead..., task[, other_task]) with those coordinates of the Gramian that lie on its dimensions."""
    dims = (*lead, *("task", "other_task")[: values.ndim - len(lead)])
    coords = {name: coord for name, coord in gramian.coords.items() if coord.dims and set(coord.dims) <= set(dims)}
    return xr.DataArray(values, dims=dims, coords=coords)


def diagonal(matrix: xr.DataArray) -> xr.DataArray:
    """The diagonal (..., task) of (..., task, other_task)."""
    at = xr.DataArray(np.arange(matrix.sizes["task"]), dims="task")
    return matrix.isel(other_task=at).drop_vars([name for name in matrix.coords if str(name).startswith("other_")])


def as_other(values: xr.DataArray) -> xr.DataArray:
    """The same values along ``other_task`` instead of ``task``."""
    plain = values.drop_vars([name for name in values.coords if "task" in values[name].dims])
    return plain.rename(task="other_task")


def unbiased_gramian(moments: xr.Dataset) -> xr.DataArray:
    """<g_k, g_l> (..., task, other_task): the products, with the unbiased squared norms on the diagonal."""
    product = moments["product"]
    same = xr.DataArray(np.eye(product.sizes["task"], dtype=bool), dims=("task", "other_task"))
    return xr.where(same, moments["squared_norm"], product).transpose(*product.dims).assign_coords(product.coords)
