"""z-scores, false discoveries and conflict rates of gradients with known conflicts."""

import numpy as np
import pytest
from scipy import stats

from analysis import moments, significance
from analysis.gramians import gramian_arrays
from analysis.jackknife import half_width
from analysis.moments import task_gramian
from tests.analysis.simulation import ABOVE, COSINES, HALVES, WIDTH, K, simulated


def pair_values(values):
    return values.transpose(..., "task", "other_task").values[..., *ABOVE]


def noise_only(steps, copies=1, seed=0):
    data = simulated(steps, copies, means=np.zeros((K, WIDTH)), seed=seed)
    return data.gramian, data.group_count


def correlated_noise(steps, copies, correlation, seed=0):
    """Gradients without common direction that change slowly from probe to probe: AR(1) in every coordinate."""
    rng = np.random.default_rng(seed)
    state = rng.standard_normal((copies, K, WIDTH))
    values = np.empty((steps, copies, K * HALVES, K * HALVES))
    for step in range(steps):
        state = correlation * state + np.sqrt(1 - correlation**2) * rng.standard_normal(state.shape)
        groups = np.repeat(state, HALVES, axis=1)
        values[step] = groups @ groups.swapaxes(-1, -2)
    counts = np.full((steps, K * HALVES), 8)
    data = gramian_arrays(values, counts, layers=[str(i) for i in range(copies)], halves=HALVES, bounds=range(K + 1))
    return data.gramian, data.group_count


def test_p_values_of_noise_are_uniform():
    """Of independent probes, few (each a unit) and many (in batches)."""
    for steps in (12, 100):
        gramian, count = noise_only(steps, copies=200)
        p_values = pair_values(significance.z_scores(gramian, count).p_value)
        assert 0.02 < (p_values < 0.05).mean() < 0.08
        assert stats.kstest(p_values[:, 0], "uniform").pvalue > 0.005


def test_autocorrelated_probes_do_not_pass_for_independent_ones():
    gramian, count = correlated_noise(1600, 60, correlation=0.95)
    products = pair_values(task_gramian(gramian, count))
    naive = stats.ttest_1samp(products, 0.0, axis=0).pvalue
    assert (naive < 0.05).mean() > 0.4
    got = pair_values(significance.z_scores(gramian, count).p_value)
    assert (got < 0.05).mean() < 0.11


def test_false_discovery_rate_holds_over_all_layers_at_once():
    false_rates, found_any = [], []
    for seed in range(12):
        gramian, count = noise_only(30, copies=25, seed=seed)
        scores = significance.z_scores(gramian, count)
        found_any.append(significance.significant_pairs(scores).values.any())
        signal = simulated(30, 1, seed=seed)
        gramian[:, 0] = signal.gramian[:, 0]  # one layer with signal among 24 of noise
        found = pair_values(significance.significant_pairs(significance.z_scores(gramian, signal.group_count)))
        false_rates.append(found[1:].sum() / max(found.sum(), 1))
        assert found[0].any()
    assert np.mean(found_any) < 0.3
    assert np.mean(false_rates) < 0.12


def test_scores_have_the_sign_of_the_truth_and_nothing_on_the_diagonal():
    data = simulated(200, 4)
    scores = significance.z_scores(data.gramian, data.group_count)
    clear = np.abs(COSINES[ABOVE]) > 0.2
    np.testing.assert_array_equal(
        np.sign(pair_values(scores.z))[:, clear], np.tile(np.sign(COSINES[ABOVE][clear]), (4, 1))
    )
    found = significance.significant_pairs(scores)
    assert pair_values(found)[:, clear].all()
    np.testing.assert_array_equal(found, found.transpose("layer", "other_task", "task"))
    assert not found.values[:, range(K), range(K)].any()
    adjusted = stats.false_discovery_control(pair_values(scores.p_value).ravel())
    np.testing.assert_allclose(pair_values(scores.q_value).ravel(), adjusted)


def test_one_probe_says_nothing():
    data = simulated(1, 2)
    scores = significance.z_scores(data.gramian, data.group_count)
    assert scores.z.isnull().all()
    assert not significance.significant_pairs(scores).any()
    rate = significance.conflict_rate(data.gramian, data.group_count)
    assert rate.standard_error.isnull().all()
    assert rate.conflicting.isnull().all()


def test_conflict_rate_of_noise_is_a_half_and_nothing_in_it_is_significant():
    found = significance.conflict_rate(*noise_only(400, copies=20))
    inside = np.abs(found.rate - found.null) <= half_width(found)
    assert inside.mean() > 0.8
    assert float(found.rate.mean()) == pytest.approx(0.5, abs=0.02)
    assert 0.8 < float((found.by_step.std("gradient_step") / found.null_error).mean()) < 1.25
    assert float(found.conflicting.mean()) < 0.02


def test_the_plain_rate_counts_noise_as_conflict_and_the_tested_one_does_not():
    """Two of six pairs conflict (-0.3, -0.4) and one has no direction; noise turns the signs of single probes."""
    data = simulated(300, 20, traces=np.array([200.0, 300.0, 100.0, 140.0]))
    found = significance.conflict_rate(data.gramian, data.group_count)
    assert float(found.rate.mean()) > 0.41
    clean = simulated(300, 20, traces=np.array([2.0, 3.0, 1.0, 1.4]))
    found = significance.conflict_rate(clean.gramian, clean.group_count)
    np.testing.assert_allclose(found.conflicting, 2 / 6, atol=0.17)
    assert float(found.conflicting.mean()) == pytest.approx(2 / 6, abs=0.02)
    assert float(found.agreeing.mean()) == pytest.approx(3 / 6, abs=0.02)


def test_error_of_the_rate_covers_its_expectation():
    data = simulated(40, 300)
    found = significance.conflict_rate(data.gramian, data.group_count)
    inside = np.abs(found.rate - float(found.rate.mean())) <= half_width(found)
    assert 0.90 < inside.mean() < 0.99


def test_rates_count_only_known_pairs():
    data = simulated(20, 1)
    count = data.group_count.copy()
    count[:, 1] = 0
    found = significance.conflict_rate(data.gramian, count)
    products = task_gramian(data.gramian, count)[:, 0]
    known = [(0, 2), (0, 3), (2, 3)]
    expected = np.mean([[float(products[step, k, other]) < 0 for k, other in known] for step in range(20)])
    assert float(found.rate[0]) == pytest.approx(expected)
    assert float(found.null_error[0]) == pytest.approx(0.5 / np.sqrt(3))


def test_the_rate_of_probes_is_that_of_their_signs_layer_by_layer():
    data = simulated(25, 3)
    found = significance.probe_rate(data.gramian, data.group_count)
    negative = pair_values(task_gramian(data.gramian, data.group_count)) < 0
    np.testing.assert_allclose(found.by_step, negative.mean(-1))
    np.testing.assert_allclose(found.rate, negative.mean((0, -1)))
    np.testing.assert_allclose(found.standard_error, negative.mean(-1).std(0, ddof=1) / 5)
    whole = significance.conflict_rate(data.gramian, data.group_count)
    assert whole[list(found)].identical(found)


def test_rates_do_not_depend_on_how_many_probes_are_taken_at_once(monkeypatch):
    data = simulated(70, 3)
    whole = significance.conflict_rate(data.gramian, data.group_count)
    monkeypatch.setattr(moments, "_CHUNK_BYTES", 1)
    np.testing.assert_allclose(whole.to_array(), significance.conflict_rate(data.gramian, data.group_count).to_array())
