"""The engine of `agreement`: correlation of two matrices' ranks, tested by permuting the tasks of one of them.

All permutations are evaluated at once. Permuting tasks only moves ranks about, so they are taken once; partial
correlations come from the Gram matrix of the residuals and what is given, for whichever cells are defined.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import stats

FloatArray = npt.NDArray[np.float64]
Scheme = Literal["tasks", "shifts"]
"""Which permutations: all of the tasks, or only those that keep neighbours together, see `agreement`."""
PAIR = ("task", "other_task")
MIN_FREE = 3
"""Cells needed beyond one for every matrix that is given."""
_BATCH_CELLS = 2_000_000
_UNEXPLAINED = 1e-10
"""A share of the variance below this is rounding: the given matrices explain the other one completely."""
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class RankCorrelation:
    """Agreement of two matrices.

    Attributes:
        correlation: Spearman's rank correlation over the pairs of tasks, in [-1, 1]; NaN if either matrix is constant,
            or explained completely by what is given.
        p_value: Two-sided permutation p-value.
        pairs: Pairs of tasks (ordered ones if both matrices are directed) that are defined in all matrices.
    """

    correlation: float
    p_value: float
    pairs: int


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells in which matrices are compared.

    Attributes:
        rows: (N,) first task of each cell.
        columns: (N,) second one.
        tasks: Number of tasks that have a cell.
        both_ways: Whether the order of a pair matters.
        first: (N,) ranks of the first matrix.
        second: (N,) of the second.
        known: (N, 1 + G) a constant and the ranks of those given.
    """

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    tasks: int
    both_ways: bool
    first: FloatArray
    second: FloatArray
    known: FloatArray

    @property
    def size(self) -> int:
        """N."""
        return len(self.rows)

    @property
    def enough(self) -> bool:
        """Whether there are cells enough for a correlation."""
        return self.size >= self.needed

    @property
    def needed(self) -> int:
        """Cells that a correlation needs."""
        return MIN_FREE + self.known.shape[1] - 1

    @classmethod
    def of(cls, first: xr.DataArray, second: xr.DataArray, given: Sequence[xr.DataArray]) -> Cells:
        """The cells of two matrices and those given.

        Raises:
            ValueError: If they are not over the same tasks.
        """
        matrices = [first, second, *given]
        for matrix in matrices:
            _check_same_tasks(first, matrix)
        both_ways = _is_directed(first) and _is_directed(second)
        values = [matrix.values.astype(float) for matrix in matrices]
        if not both_ways:
            values = [(array + array.T) / 2 for array in values]
        defined = np.isfinite(values).all(0) & ~np.eye(len(values[0]), dtype=bool)
        kept = np.flatnonzero(defined.any(0) | defined.any(1))
        at = np.ix_(kept, kept)
        rows, columns = np.nonzero(defined[at] if both_ways else np.triu(defined[at]))
        ranks = [stats.rankdata(array[at][rows, columns]) for array in values]
        known = np.column_stack([np.ones(len(rows)), *ranks[2:]])
        return cls(rows, columns, len(kept), both_ways, ranks[0], ranks[1], known)


def _check_same_tasks(first: xr.DataArray, other: xr.DataArray) -> None:
    if other.dims != PAIR or other.sizes != first.sizes:
        raise ValueError(f"two (task, other_task) matrices are needed, got {dict(first.sizes)} and {dict(other.sizes)}")
    if "interval" in first.coords and "interval" in other.coords:
        labels = [[str(label) for label in matrix["interval"].values] for matrix in (first, other)]
        if labels[0] != labels[1]:
            raise ValueError(f"the matrices are over different intervals: {labels[0]} and {labels[1]}")


def _is_directed(matrix: xr.DataArray) -> bool:
    if "directed" in matrix.attrs:
        return bool(matrix.attrs["directed"])
    return not np.allclose(matrix.values, matrix.values.T, equal_nan=True)


def mantel_test(cells: Cells, *, scheme: Scheme, permutations: int, seed: int) -> RankCorrelation:
    """(Partial) correlation of the ranks, and how many permutations of the second matrix's residuals reach it.

    Args:
        cells: What to compare.
        scheme: Which permutations.
        permutations: How many, where not all are taken.
        seed: Of their generator.
    """
    basis = _orthonormal(cells.known)
    left, right = (_residual(ranks, basis) for ranks in (cells.first, cells.second))
    if left is None or right is None:
        return RankCorrelation(np.nan, np.nan, cells.size)
    residuals = np.full((cells.tasks, cells.tasks), np.nan)
    residuals[cells.rows, cells.columns] = right
    if not cells.both_ways:
        residuals[cells.columns, cells.rows] = right
    observed = float(left @ right / np.sqrt((left @ left) * (right @ right)))
    every = _every_order(cells.tasks, scheme, permutations)
    batch = max(1, _BATCH_CELLS // cells.size)
    orders = _random_orders(cells.tasks, permutations, seed, batch) if every is None else iter([every])
    as_extreme, count = (0, 0) if every is not None else (1, 1)  # what was observed is one of them
    for order in orders:
        permuted = residuals[order[:, cells.rows], order[:, cells.columns]]
        found = np.abs(_correlations(left, basis, permuted))
        # Rounding must not make a permutation that changes nothing less extreme than what was observed, and an
        # undefined correlation is no evidence against chance.
        as_extreme += int((~(found < abs(observed) - _ROUNDING)).sum())
        count += len(order)
    return RankCorrelation(observed, as_extreme / count, cells.size)


def _every_order(tasks: int, scheme: Scheme, permutations: int) -> npt.NDArray[np.int64] | None:
    """All permutations (P, K) of a scheme, the identity among them; None if there are more than so many."""
    if scheme == "shifts":
        turned = np.array([np.roll(np.arange(tasks), shift) for shift in range(tasks)])
        return np.concatenate([turned, turned[:, ::-1]])
    if math.factorial(tasks) > permutations:
        return None
    return np.array(list(itertools.permutations(range(tasks))))


def _random_orders(tasks: int, permutations: int, seed: int, batch: int) -> Iterator[npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    for start in range(0, permutations, batch):
        yield rng.permuted(np.tile(np.arange(tasks), (min(batch, permutations - start), 1)), axis=1)


def _orthonormal(columns: FloatArray) -> FloatArray:
    """(N, rank) orthonormal basis of the column space, so that given matrices may be the same in ranks."""
    vectors, values, _ = np.linalg.svd(columns, full_matrices=False)
    return vectors[:, values > _UNEXPLAINED * values[0]]


def _residual(values: FloatArray, basis: FloatArray) -> FloatArray | None:
    """What the basis does not explain; None if nothing is left."""
    rest = values - basis @ (basis.T @ values)
    return rest if rest @ rest > _UNEXPLAINED * (values @ values) else None


def _correlations(left: FloatArray, basis: FloatArray, permuted: FloatArray) -> FloatArray:
    """Partial correlation of ``left`` (N,) with each row of (B, N) given the basis (N, R), over the cells defined.

    With W the 0/1 weights of the defined cells and X the basis: the 2 x 2 Schur complement of X'WX in the weighted
    Gram matrix of (X, left, row).
    """
    known = np.isfinite(permuted)
    if known.all():  # X'X is the identity, and nothing of left lies in X
        own = (permuted**2).sum(1) - ((permuted @ basis) ** 2).sum(1)
        return _over_root(permuted @ left, (left @ left) * own, (left @ left) * (permuted**2).sum(1))
    weight, row = known.astype(float), np.where(known, permuted, 0.0)
    rank = basis.shape[1]
    gram = (weight @ (basis[:, :, None] * basis[:, None, :]).reshape(len(basis), -1)).reshape(-1, rank, rank)
    inverse = np.linalg.pinv(gram, hermitian=True)
    with_left, with_row = weight @ (basis * left[:, None]), row @ basis
    explained = np.einsum("br,brs->bs", with_row, inverse)
    product = row @ left - np.einsum("bs,bs->b", explained, with_left)
    of_row = (row**2).sum(1) - np.einsum("bs,bs->b", explained, with_row)
    of_left = weight @ left**2 - np.einsum("br,brs,bs->b", with_left, inverse, with_left)
    return _over_root(product, of_row * of_left, (row**2).sum(1) * (weight @ left**2))


def _over_root(products: FloatArray, squares: FloatArray, scale: FloatArray) -> FloatArray:
    """products / sqrt(squares), NaN where the squares are nothing but rounding."""
    valid = squares > _UNEXPLAINED * scale
    return np.divide(products, np.sqrt(np.where(valid, squares, 1.0)), out=np.full_like(products, np.nan), where=valid)
