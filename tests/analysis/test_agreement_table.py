"""The table of all agreements: every pair, with p-values adjusted over the questions that were asked."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.agreement import AGREEMENT_COLUMNS, agreement_table, distance_matrix, rank_correlation
from analysis.gramians import task_coordinates
from tests.analysis.test_agreement import closeness, matrix, symmetric


def test_distances_are_those_of_the_coordinate():
    tasks = task_coordinates([0, 10, 30, 60, 100], np.linspace(8, -8, 100))
    near = distance_matrix(tasks)
    np.testing.assert_array_equal(near, closeness(4))
    by_snr = distance_matrix(tasks, "log_snr")
    snr = tasks["log_snr"].values
    assert by_snr.values[0, 3] == snr[3] - snr[0]
    assert set(tasks.coords) == set(near.coords)
    assert not near.attrs["directed"]
    with pytest.raises(ValueError, match="no coordinate 'loss'"):
        distance_matrix(tasks, "loss")


def test_the_table_holds_every_pair_with_adjusted_p_values():
    rng = np.random.default_rng(10)
    shared = symmetric(rng, 12)
    found = {name: matrix(closeness(12) + shared + 0.4 * symmetric(rng, 12)) for name in ("a", "b")}
    found["c"] = matrix(rng.standard_normal((12, 12)), directed=True)
    found["empty"] = matrix(np.full((12, 12), np.nan))
    near = [matrix(closeness(12))]
    table = agreement_table(found, given=near, permutations=999)
    assert list(table.columns) == AGREEMENT_COLUMNS
    assert [(row["first"], row["second"]) for _, row in table.iterrows()] == list(itertools.combinations(found, 2))
    first = table.iloc[0]
    plain = rank_correlation(found["a"], found["b"], permutations=999)
    beyond = rank_correlation(found["a"], found["b"], given=near, permutations=999)
    shifts = rank_correlation(found["a"], found["b"], given=near, scheme="shifts")
    assert (first["correlation"], first["p_value"], first["pairs"]) == (plain.correlation, plain.p_value, 66)
    assert (first["partial"], first["partial_p_value"]) == (beyond.correlation, beyond.p_value)
    assert first["shift_p_value"] == shifts.p_value
    for prefix in ("", "partial_", "shift_"):
        known = table[f"{prefix}p_value"].dropna()
        np.testing.assert_allclose(table.loc[known.index, f"{prefix}q_value"], stats.false_discovery_control(known))
    empty = table[table["second"] == "empty"]
    assert empty[["correlation", "q_value", "partial_q_value"]].isna().all(axis=None)
    assert table["significant"].tolist() == [True, *[False] * 5]
    assert not table["partial_significant"].any(), "of three pairs tested by shifts one at 1/24 is not enough"
    default = agreement_table({name: found[name] for name in "ab"}, permutations=999)
    assert default["partial"][0] == first["partial"]


def test_what_is_only_shown_beside_is_not_tested_nor_counted():
    rng = np.random.default_rng(10)
    shared = symmetric(rng, 12)
    found = {name: matrix(closeness(12) + shared + 0.4 * symmetric(rng, 12)) for name in "abc"}
    alone = agreement_table(found, permutations=999)
    beside = agreement_table(found, beside={"near": matrix(closeness(12))}, permutations=999)
    near = beside["second"] == "near"
    assert near.sum() == 3
    pd.testing.assert_frame_equal(beside[~near].reset_index(drop=True), alone)
    assert (beside.loc[near, "p_value"] < 0.01).all()
    assert beside.loc[near, ["q_value", "shift_q_value"]].isna().all(axis=None)
    assert not beside.loc[near, "significant"].any()


def test_partial_significance_takes_the_adjusted_shifts():
    """One pair among many: 1/24 from shifts is below 5 % alone, and not after adjusting for all that were asked."""
    rng = np.random.default_rng(4)
    shared = symmetric(rng, 12)
    pair = {name: matrix(shared + 0.1 * symmetric(rng, 12)) for name in "ab"}
    assert agreement_table(pair, permutations=999)["partial_significant"].tolist() == [True]
    crowd = {name: matrix(symmetric(rng, 12)) for name in "cdef"}
    many = agreement_table({**pair, **crowd}, permutations=999)
    first = many.iloc[0]
    assert first["shift_p_value"] <= 0.05 < first["shift_q_value"]
    assert first["partial_q_value"] <= 0.05
    assert not first["partial_significant"]
