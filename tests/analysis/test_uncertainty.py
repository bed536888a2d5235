import numpy as np
import pytest
from scipy import stats

from analysis.uncertainty import bootstrap_runs, mean_interval, seed_warning


def test_mean_interval_by_hand_and_against_scipy():
    two = mean_interval([1.0, 3.0])
    assert (two.estimate, two.count) == (2.0, 2)
    assert two.high - two.estimate == pytest.approx(12.7062047, rel=1e-6)  # t(0.975, 1) * sqrt(2) / sqrt(2)
    sample = np.random.default_rng(0).standard_normal(7)
    got = mean_interval(sample, 0.9)
    expected = stats.ttest_1samp(sample, 0).confidence_interval(0.9)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high))


def test_one_value_has_no_interval():
    one = mean_interval([5.0])
    assert one.estimate == 5.0
    assert np.isnan(one.low)
    assert not one.excludes_zero
    assert mean_interval([]).count == 0
    assert mean_interval([-1.0, -1.1, -0.9]).excludes_zero


def test_bootstrap_resamples_whole_runs_and_covers():
    """Half of the variance is shared within a run: intervals that resampled single tasks would cover about 60 %."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        runs = rng.standard_normal((12, 1)) + rng.standard_normal((12, 8))
        got = bootstrap_runs(runs, lambda each: float(each.mean()), resamples=200)
        covered.append(got.low < 0 < got.high)
    assert 0.85 < np.mean(covered) < 0.98


def test_bootstrap_is_reproducible_and_leaves_the_global_generator_alone():
    runs = np.random.default_rng(1).standard_normal((5, 3))
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = bootstrap_runs(runs, np.median, resamples=50)
    assert first == bootstrap_runs(runs, np.median, resamples=50)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_seed_warnings():
    assert "One seed" in seed_warning(1)
    assert "before claiming it" in seed_warning(2)
    assert seed_warning(3) is None
