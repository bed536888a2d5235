import itertools

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from analysis import affinity
from tests.analysis import synthetic
from tests.analysis.synthetic import K


def matrix(values):
    return xr.DataArray(values, dims=("task", "other_task"))


def symmetric(rng, size=K):
    values = rng.standard_normal((size, size))
    return values + values.T


def test_gradient_affinity_finds_the_two_groups(runs):
    got = affinity.gradient_affinity(runs[0])
    above = np.triu_indices(K, 1)
    same = (synthetic.true_cosine() == synthetic.WITHIN)[above]
    assert got.values[above][same].min() > 0.4
    assert got.values[above][~same].max() < 0.1
    plain = affinity.gradient_affinity(runs[0], corrected=False)
    assert np.abs(plain.values[above]).mean() < 0.5 * np.abs(got.values[above]).mean()
    by_block = affinity.gradient_affinity(runs[0], level="block")
    assert by_block.block.values.tolist() == ["x_embedder", "blocks.0", "blocks.1", "final_layer"]
    assert by_block.dims == ("block", "task", "other_task")


def test_mask_overlap_equals_brute_force(runs):
    run = next(run for run in runs if run.attrs["method"] == "dtr")
    masks = run["mask"].values
    expected = np.zeros((K, K))
    width = synthetic.T // K
    for i, j in itertools.product((0, 3, 7), repeat=2):
        pairs = itertools.product(range(i * width, (i + 1) * width), range(j * width, (j + 1) * width))
        scores = [(mask[a] & mask[b]).sum() / (mask[a] | mask[b]).sum() for a, b in pairs for mask in masks]
        expected[i, j] = np.mean(scores)
        assert affinity.mask_overlap(run).values[i, j] == pytest.approx(expected[i, j])
    assert list(affinity.mask_overlap(run).interval.values) == list(run.interval.values)


def test_mask_overlap_weighs_blocks_with_different_masks(runs):
    run = next(run for run in runs if run.attrs["method"] == "dtr").copy(deep=True)
    shared = affinity.mask_overlap(run)
    run["mask"][1] = True
    np.testing.assert_allclose(affinity.mask_overlap(run), (shared + 1) / 2)


def test_rank_correlation_is_spearmans_with_a_valid_p_value():
    rng = np.random.default_rng(0)
    first, second = symmetric(rng), symmetric(rng)
    above = np.triu_indices(K, 1)
    got = affinity.rank_correlation(matrix(first), matrix(second), permutations=200)
    assert got.correlation == pytest.approx(stats.spearmanr(first[above], second[above]).statistic)
    assert got.p_value > 0.05
    same = affinity.rank_correlation(matrix(first), matrix(np.exp(first)), permutations=999)
    assert (same.correlation, same.p_value) == (pytest.approx(1.0), pytest.approx(0.001, abs=0.0015))


def test_rank_correlation_p_values_are_uniform_without_agreement():
    rng = np.random.default_rng(1)
    p = [
        affinity.rank_correlation(matrix(symmetric(rng)), matrix(symmetric(rng)), permutations=99).p_value
        for _ in range(100)
    ]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_rank_correlation_skips_undefined_cells():
    rng = np.random.default_rng(2)
    first = symmetric(rng)
    holes = first.copy()
    holes[0, :] = holes[:, 0] = np.nan
    got = affinity.rank_correlation(matrix(holes), matrix(first), permutations=99)
    assert (got.correlation, got.pairs) == (pytest.approx(1.0), 21)
    with pytest.raises(ValueError, match="only 0 pairs"):
        affinity.rank_correlation(matrix(np.full((K, K), np.nan)), matrix(first))


def test_runs_without_the_data_are_refused(runs):
    with pytest.raises(ValueError, match="baseline-0 is not routed"):
        affinity.mask_overlap(runs[0])
    with pytest.raises(ValueError, match="no gradient_conflict telemetry"):
        affinity.gradient_affinity(runs[0].drop_vars("gramian"))
