"""How well affinity matrices agree: rank correlation, also beyond what the distance between tasks explains.

The cells of a matrix share tasks, so they are not independent; permutation tests permute the tasks (Mantel, Cancer
Research 27, 1967). And neighbouring intervals are alike in nearly any affinity: two matrices that have nothing else in
common correlate highly because both fall with the distance in t. The question worth asking is mostly the partial one,
given `distance_matrix`.

How matrices are compared:

- Of two directed matrices all cells off the diagonal are compared, otherwise the pairs of tasks: a directed matrix is
  then made symmetric (the mean of both directions), since an undirected one can agree with nothing else of it.
- Cells that are undefined in any of the matrices are left out, tasks without any defined cell before anything else.
- Directed affinities that are shares of task j's loss have a scale of their own in every column; two of them agree
  merely for having it. Take them ``relative`` to what training on j itself does.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from analysis.mantel import PAIR, Cells, RankCorrelation, Scheme, mantel_test
from analysis.significance import FALSE_DISCOVERY_RATE, q_values

AGREEMENT_COLUMNS = [
    "first", "second", "pairs", "correlation", "p_value", "q_value", "partial", "partial_p_value", "partial_q_value",
    "shift_p_value", "shift_q_value", "significant", "partial_significant",
]  # fmt: skip


def rank_correlation(
    first: xr.DataArray,
    second: xr.DataArray,
    *,
    given: Sequence[xr.DataArray] = (),
    scheme: Scheme = "tasks",
    permutations: int = 9999,
    seed: int = 0,
) -> RankCorrelation:
    """Mantel test: Spearman correlation of two affinities, or the partial one given others, tasks permuted jointly.

    The partial rank correlation is the correlation of the residuals of both matrices' ranks after linear regression on
    the ranks of those given. What is permuted are the tasks of the second matrix's residuals (without anything given:
    of its ranks), and the permuted residuals are regressed again on what is given: the scheme of Freedman and Lane,
    method 2 of Legendre (Journal of Statistical Computation and Simulation 67, 2000). Permuting the raw second matrix
    (Smouse, Long and Sokal, Systematic Zoology 35, 1986) would break what it has to do with the given ones, too, and
    find too much.

    With ``scheme="tasks"`` residuals count as exchangeable between tasks. They are not where they are smooth in t, and
    the test then finds far too much (Guillot and Rousset, Methods in Ecology and Evolution 4, 2013): in a simulation
    with nothing in common but the distance and residuals smooth over one neighbour, 30 % of p-values fell below 0.05
    (`tests/analysis/test_agreement.py`). ``scheme="shifts"`` takes only the 2K permutations that shift all tasks
    cyclically or reverse them, which keep neighbours together but for the seam (as Lotwick and Silverman's toroidal
    shifts, Journal of the Royal Statistical Society B 44, 1982): about 5 % there. Its smallest p-value is 1 / (2K), so
    fewer than ten intervals cannot prove anything by it, and that is the truth about few neighbouring intervals.

    Args:
        first: (task, other_task); the diagonal is not used.
        second: Likewise, on the same tasks.
        given: Likewise, such as `distance_matrix`.
        scheme: Which permutations to take.
        permutations: Random permutations of the tasks; the smallest possible p-value is 1 / (permutations + 1). If
            there are no more than that at all, each is taken once and the p-value is exact. Permutations move undefined
            cells; one whose correlation is undefined counts as extreme, which errs on the safe side.
        seed: Of the permutations' own generator.

    Raises:
        ValueError: If the matrices are not over the same tasks, or too few pairs are defined in all of them.
    """
    cells = Cells.of(first, second, given)
    if not cells.enough:
        raise ValueError(
            f"only {cells.size} pairs of tasks are defined in all matrices, at least {cells.needed} are needed"
        )
    return mantel_test(cells, scheme=scheme, permutations=permutations, seed=seed)


def distance_matrix(tasks: xr.DataArray | xr.Dataset, coordinate: str = "task") -> xr.DataArray:
    """Minus the distance between tasks: the affinity that says nothing but "neighbours are alike".

    Args:
        tasks: Anything with the interval coordinates.
        coordinate: In which to measure: ``"task"`` for |i - j|, ``"log_snr"`` for the difference in log-SNR.

    Returns:
        (task, other_task).

    Raises:
        ValueError: If there is no such coordinate.
    """
    if coordinate not in tasks.coords:
        raise ValueError(
            f"no coordinate {coordinate!r} to measure distances in; there are {', '.join(map(str, tasks.coords))}"
        )
    at = tasks[coordinate].values.astype(float)
    coords = {name: coord for name, coord in tasks.coords.items() if coord.dims in (PAIR[:1], PAIR[1:])}
    matrix = xr.DataArray(-np.abs(at[:, None] - at), dims=PAIR, coords=coords, name=f"closeness in {coordinate}")
    return matrix.assign_attrs(long_name="minus the distance", directed=False)


def agreement_table(
    matrices: Mapping[str, xr.DataArray],
    *,
    beside: Mapping[str, xr.DataArray] | None = None,
    given: Sequence[xr.DataArray] | None = None,
    permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlation of every two affinities, plain and given the distance between tasks.

    Args:
        matrices: By name, all over the same tasks.
        beside: Further ones to show them beside, such as `distance_matrix`. No question is asked about those, so their
            rows have no q-values and are never significant.
        given: What the partial correlation takes out; `distance_matrix` in |i - j| without it.
        permutations: As for `rank_correlation`.
        seed: Likewise.

    Returns:
        One row for every two matrices, columns `AGREEMENT_COLUMNS`: the plain correlation, the ``partial`` one, and
        their p-values from permutations of tasks; ``shift_p_value`` is that of the partial correlation from shifts.
        q-values are adjusted over all pairs of ``matrices`` (Benjamini and Hochberg, Journal of the Royal Statistical
        Society B 57, 1995). NaN where too few pairs of tasks are defined or nothing is left to correlate.
        ``significant`` says whether the q-value is at most 0.05, ``partial_significant`` whether that of the partial
        correlation is by both schemes.

    Raises:
        ValueError: If the matrices are not over the same tasks.
    """
    rows = []
    for (name, first), (other, second) in itertools.combinations({**matrices, **(beside or {})}.items(), 2):
        known = [distance_matrix(first)] if given is None else given
        plain, partial = Cells.of(first, second, ()), Cells.of(first, second, known)
        both = _test_if_enough(plain, "tasks", permutations, seed)
        beyond = _test_if_enough(partial, "tasks", permutations, seed)
        rows.append(
            {
                "first": name,
                "second": other,
                "pairs": plain.size,
                "correlation": both.correlation,
                "p_value": both.p_value,
                "partial": beyond.correlation,
                "partial_p_value": beyond.p_value,
                "shift_p_value": _test_if_enough(partial, "shifts", permutations, seed).p_value,
            }
        )
    table = pd.DataFrame(rows, columns=AGREEMENT_COLUMNS)
    asked = ~table[["first", "second"]].isin(list(beside or {})).any(axis=1)
    for prefix in ("", "partial_", "shift_"):
        table[f"{prefix}q_value"] = q_values(table[f"{prefix}p_value"].where(asked))
    table["significant"] = table["q_value"] <= FALSE_DISCOVERY_RATE
    table["partial_significant"] = (table[["partial_q_value", "shift_q_value"]] <= FALSE_DISCOVERY_RATE).all(axis=1)
    return table


def _test_if_enough(cells: Cells, scheme: Scheme, permutations: int, seed: int) -> RankCorrelation:
    if not cells.enough:
        return RankCorrelation(np.nan, np.nan, cells.size)
    return mantel_test(cells, scheme=scheme, permutations=permutations, seed=seed)
