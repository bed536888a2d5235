"""Rank correlations of affinities: Spearman's by scipy, p-values by brute force, levels by simulation."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.agreement import agreement_table, rank_correlation
from analysis.gramians import task_coordinates

K = 8


def matrix(values, directed=False):
    values = np.asarray(values, dtype=float)
    tasks = {"task": np.arange(len(values)), "other_task": np.arange(len(values))}
    return xr.DataArray(values, tasks, ("task", "other_task"), attrs={"directed": directed})


def symmetric(rng, size=K, smooth=0.0):
    """Independent entries, or such as resemble their neighbours over so many tasks."""
    values = rng.standard_normal((size, size))
    values = values + values.T
    if smooth:
        kernel = np.exp(-0.5 * (np.subtract.outer(np.arange(size), np.arange(size)) / smooth) ** 2)
        values = kernel @ values @ kernel.T
    return values / values[np.triu_indices(size, 1)].std()


def closeness(size=K):
    return -np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(float)


def off_diagonal(values):
    return values[~np.eye(len(values), dtype=bool)]


def above(values):
    return values[np.triu_indices(len(values), 1)]


def residual(values, *known):
    """Of ranks, after least squares."""
    columns = np.column_stack([np.ones(len(values)), *(stats.rankdata(each) for each in known)])
    ranks = stats.rankdata(values)
    return ranks - columns @ np.linalg.lstsq(columns, ranks)[0]


def partial(first, second, *known):
    """The residual definition of the partial rank correlation."""
    return float(np.corrcoef(residual(first, *known), residual(second, *known))[0, 1])


def test_it_is_spearmans_over_pairs_and_over_both_directions():
    rng = np.random.default_rng(0)
    first, second = symmetric(rng), symmetric(rng)
    got = rank_correlation(matrix(first), matrix(second), permutations=99)
    assert got.correlation == pytest.approx(stats.spearmanr(above(first), above(second)).statistic)
    assert got.pairs == K * (K - 1) / 2
    one_way, other = rng.standard_normal((2, K, K))
    got = rank_correlation(matrix(one_way, True), matrix(other, True), permutations=99)
    assert got.correlation == pytest.approx(stats.spearmanr(off_diagonal(one_way), off_diagonal(other)).statistic)
    assert got.pairs == K * (K - 1)


def test_a_directed_affinity_is_symmetrised_against_an_undirected_one():
    rng = np.random.default_rng(1)
    directed, other = rng.standard_normal((K, K)), symmetric(rng)
    expected = stats.spearmanr(above(directed + directed.T), above(other)).statistic
    for pair in ((matrix(directed, True), matrix(other)), (matrix(other), matrix(directed, True))):
        assert rank_correlation(*pair, permutations=99).correlation == pytest.approx(expected)
    unlabelled = [matrix(values).assign_attrs(directed=None) for values in (directed, other)]
    for each in unlabelled:
        del each.attrs["directed"]
    assert rank_correlation(*unlabelled, permutations=99).correlation == pytest.approx(expected)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("known", [0, 1])
def test_the_p_value_of_few_tasks_is_that_of_every_permutation(directed, known):
    size = 5
    rng = np.random.default_rng(2)
    take = off_diagonal if directed else above
    first, second = (rng.standard_normal((size, size)) if directed else symmetric(rng, size) for _ in range(2))
    given_matrices = [closeness(size)] * known
    observed, at_least = partial(take(first), take(second), *map(take, given_matrices)), 0
    rest = np.zeros((size, size))
    rest[~np.eye(size, dtype=bool) if directed else np.triu_indices(size, 1)] = residual(
        take(second), *map(take, given_matrices)
    )
    rest = rest if directed else rest + rest.T
    columns = np.column_stack([np.ones(len(take(first))), *(stats.rankdata(take(each)) for each in given_matrices)])
    for order in itertools.permutations(range(size)):
        moved = take(rest[np.ix_(order, order)])
        moved = moved - columns @ np.linalg.lstsq(columns, moved)[0]
        correlation = np.corrcoef(residual(take(first), *map(take, given_matrices)), moved)[0, 1]
        at_least += abs(correlation) >= abs(observed) - 1e-9
    got = rank_correlation(
        matrix(first, directed), matrix(second, directed), given=[matrix(each) for each in given_matrices]
    )
    assert got.correlation == pytest.approx(observed)
    assert got.p_value == pytest.approx(at_least / 120)


def test_shifts_are_all_cyclic_ones_and_reversals():
    rng = np.random.default_rng(3)
    first, second = symmetric(rng), symmetric(rng)
    observed = stats.spearmanr(above(first), above(second)).statistic
    orders = [np.roll(np.arange(K), shift)[::step] for shift in range(K) for step in (1, -1)]
    found = [stats.spearmanr(above(first), above(second[np.ix_(order, order)])).statistic for order in orders]
    got = rank_correlation(matrix(first), matrix(second), scheme="shifts")
    assert got.p_value == pytest.approx(np.mean(np.abs(found) >= abs(observed) - 1e-9))
    same = rank_correlation(matrix(first), matrix(first), scheme="shifts")
    assert same.p_value == pytest.approx(1 / (2 * K))


def test_random_permutations_approximate_all_of_them():
    rng = np.random.default_rng(4)
    first = symmetric(rng, 7)
    second = first + 1.5 * symmetric(rng, 7)
    exact = rank_correlation(matrix(first), matrix(second), permutations=5040)
    drawn = rank_correlation(matrix(first), matrix(second), permutations=4000)
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.015)
    again = rank_correlation(matrix(first), matrix(second), permutations=4000)
    assert again == drawn
    many = symmetric(rng, 10)
    assert rank_correlation(matrix(many), matrix(np.exp(many)), permutations=999).p_value == 1 / 1000


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(6, 9), st.integers(0, 6), st.booleans())
def test_the_partial_correlation_is_that_of_residuals_also_with_holes(seed, size, holes, directed):
    rng = np.random.default_rng(seed)
    first, second, known = (rng.standard_normal((size, size)) for _ in range(3))
    if not directed:
        first, second, known = (values + values.T for values in (first, second, known))
    for values in (first, second):
        for row, column in rng.integers(size, size=(holes, 2)):
            values[row, column] = values[row, column] if directed else np.nan
            values[column, row] = np.nan
    take = off_diagonal if directed else above
    cells = [take(values) for values in (first, second, known, closeness(size))]
    defined = np.isfinite(cells).all(0)
    cells = [values[defined] for values in cells]
    got = rank_correlation(
        matrix(first, directed),
        matrix(second, directed),
        given=[matrix(known, directed), matrix(closeness(size))],
        permutations=19,
    )
    assert got.pairs == defined.sum()
    assert got.correlation == pytest.approx(partial(*cells), abs=1e-9)
    assert 0 < got.p_value <= 1


def test_undefined_tasks_are_left_out_before_permuting():
    rng = np.random.default_rng(5)
    first, second = symmetric(rng), symmetric(rng)
    holes = first.copy()
    holes[0, :] = holes[:, 0] = np.nan
    got = rank_correlation(matrix(holes), matrix(second))
    smaller = rank_correlation(matrix(first[1:, 1:]), matrix(second[1:, 1:]))
    assert (got.pairs, got.correlation, got.p_value) == (21, smaller.correlation, smaller.p_value)
    assert rank_correlation(matrix(holes), matrix(first), permutations=99).correlation == pytest.approx(1.0)
    with pytest.raises(ValueError, match="only 0 pairs"):
        rank_correlation(matrix(np.full((K, K), np.nan)), matrix(first))


def test_single_holes_stay_on_the_safe_side():
    rng = np.random.default_rng(6)
    p_values = []
    for _ in range(200):
        first, second = symmetric(rng), symmetric(rng)
        first[2, 5] = first[5, 2] = second[0, 1] = second[1, 0] = np.nan
        p_values.append(rank_correlation(matrix(first), matrix(second), permutations=99).p_value)
    assert np.mean(np.array(p_values) <= 0.1) < 0.16


def test_what_is_constant_or_explained_has_no_correlation():
    rng = np.random.default_rng(7)
    constant = rank_correlation(matrix(np.ones((K, K))), matrix(symmetric(rng)))
    assert np.isnan([constant.correlation, constant.p_value]).all()
    near = matrix(closeness())
    # Both fall with the distance and are nothing else: perfect agreement, of which nothing is left.
    one, other = matrix(-np.sqrt(-closeness())), matrix(np.exp(closeness()))
    assert rank_correlation(one, other, permutations=99).correlation == pytest.approx(1.0)
    assert np.isnan(rank_correlation(one, other, given=[near]).correlation)
    # Given the same matrix twice is as given it once.
    noisy = [matrix(closeness() + symmetric(rng)) for _ in range(2)]
    assert rank_correlation(*noisy, given=[near, near]).correlation == pytest.approx(
        rank_correlation(*noisy, given=[near]).correlation
    )


def levels(rng, *, smooth, weight, size=12, repeats=160, **schemes):
    """Share of p-values up to 0.05 of two matrices that have nothing in common but closeness."""
    found = {name: [] for name in schemes}
    for _ in range(repeats):
        pair = [matrix(weight * closeness(size) / 3 + symmetric(rng, size, smooth)) for _ in range(2)]
        for name, options in schemes.items():
            found[name].append(rank_correlation(*pair, permutations=99, **options).p_value <= 0.0501)
    return {name: np.mean(each) for name, each in found.items()}


def test_levels_without_agreement():
    rng = np.random.default_rng(8)
    near = [matrix(closeness(12))]
    schemes = {"plain": {}, "partial": {"given": near}, "shifts": {"given": near, "scheme": "shifts"}}
    nothing = levels(rng, smooth=0, weight=0, **schemes)
    assert max(nothing.values()) < 0.11
    assert nothing["plain"] > 0.005
    # Closeness alone makes nearly every pair of matrices agree; given it, none does.
    by_distance = levels(rng, smooth=0, weight=1, **schemes)
    assert by_distance["plain"] > 0.9
    assert max(by_distance["partial"], by_distance["shifts"]) < 0.11
    # Residuals that resemble their neighbours deceive permutations of tasks, as the docstring warns, not shifts.
    smooth = levels(rng, smooth=1, weight=1, **schemes)
    assert 0.2 < smooth["partial"] < 0.45
    assert smooth["shifts"] < 0.11


def test_agreement_beyond_the_distance_is_found():
    rng = np.random.default_rng(9)
    size = 14
    shared = symmetric(rng, size)
    pair = [matrix(closeness(size) + shared + 0.5 * symmetric(rng, size)) for _ in range(2)]
    for scheme in ("tasks", "shifts"):
        got = rank_correlation(*pair, given=[matrix(closeness(size))], scheme=scheme)
        assert got.correlation > 0.5
        assert got.p_value < 0.05


def test_matrices_of_other_tasks_are_refused():
    rng = np.random.default_rng(11)
    with pytest.raises(ValueError, match=r"two \(task, other_task\) matrices"):
        rank_correlation(matrix(symmetric(rng)), matrix(symmetric(rng, 9)))
    labels = [
        matrix(symmetric(rng, 4)).assign_coords(task_coordinates(b).coords) for b in ([0, 1, 2, 3, 4], [0, 2, 3, 4, 9])
    ]
    with pytest.raises(ValueError, match="different intervals"):
        rank_correlation(*labels)
    with pytest.raises(ValueError, match="different intervals"):
        agreement_table(dict(zip("ab", labels, strict=True)))


def test_sixteen_intervals_take_less_than_a_second():
    rng = np.random.default_rng(12)
    pair = [matrix(rng.standard_normal((16, 16)), directed=True) for _ in range(2)]
    began = time.process_time()
    rank_correlation(*pair, given=[matrix(closeness(16))])
    assert time.process_time() - began < 1.0
