import numpy as np
import pytest
from scipy import stats

from analysis.uncertainty import (
    bootstrap_band,
    bootstrap_mean,
    bootstrap_runs,
    geometric_mean_interval,
    mean_interval,
    mean_p_value,
    proportion_interval,
    seed_warning,
)


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
    assert seed_warning(3, of=3) is None
    assert seed_warning(3, of=5) == "Only 3 of 5 seeds can be paired: differences between methods rest on those alone."
    assert (
        "Only 1 of 3 seeds can be paired: differences between methods rest on that one alone. One seed"
        in seed_warning(1, of=3)
    )
    assert "nothing can be paired" in seed_warning(0, of=2)


def coverage(interval_of, runs_per_draw, draws, seed=0):
    """Share of intervals that hold zero, the true mean of runs with a part in common to all their points."""
    rng = np.random.default_rng(seed)
    covered = []
    for _ in range(draws):
        runs = rng.standard_normal((runs_per_draw, 1)) + rng.standard_normal((runs_per_draw, 8))
        got = interval_of(runs)
        covered.append(got.low < 0 < got.high)
    return np.mean(covered)


def test_resampling_points_instead_of_runs_is_far_too_narrow():
    def by_run(runs):
        return bootstrap_mean(runs.mean(axis=1), resamples=300)

    def by_point(runs):
        return bootstrap_mean(runs.ravel(), resamples=300)

    assert coverage(by_run, 12, 200) > 0.85
    assert coverage(by_point, 12, 200) < 0.65


@pytest.mark.parametrize(("count", "stated"), [(3, 0.73), (5, 0.84), (10, 0.90)])
def test_undercoverage_of_few_runs_is_what_the_documentation_states(count, stated):
    got = coverage(lambda runs: bootstrap_mean(runs.mean(axis=1), resamples=300), count, 800)
    assert got == pytest.approx(stated, abs=0.03)
    assert f"{100 * stated:.0f} %" in " ".join(bootstrap_runs.__doc__.split())


def test_the_t_interval_of_three_runs_covers_where_the_bootstrap_does_not():
    assert coverage(lambda runs: mean_interval(runs.mean(axis=1)), 3, 800) == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize(("draw", "truth"), [("normal", 0.0), ("exponential", 1.0)])
def test_from_ten_runs_on_intervals_of_means_resample_runs_and_cover(draw, truth):
    """Percentiles cover 90 % there, Student's interval 90 % of a skewed distribution."""
    rng = np.random.default_rng(7)
    samples = getattr(rng, draw)(size=(1500, 10))
    found = [mean_interval(sample) for sample in samples]
    covered = np.mean([each.low < truth < each.high for each in found])
    assert covered == pytest.approx(0.95, abs=0.025)
    p_values = np.array([mean_p_value(sample - truth) for sample in samples])
    np.testing.assert_array_equal(p_values[:50] > 0.06, [each.low < truth < each.high for each in found[:50]])
    assert np.mean(p_values <= 0.05) == pytest.approx(0.05, abs=0.025)


def test_ten_equal_runs_have_an_interval_without_width():
    same = mean_interval([2.0] * 10)
    assert (same.low, same.high) == (2.0, 2.0)
    assert mean_p_value([2.0] * 10) == 0
    for tied in ([0.3] * 11 + [0.1], [0.1] * 9 + [0.2]):
        student = stats.ttest_1samp(tied, 0).confidence_interval(0.95)
        got = mean_interval(tied)
        assert (got.low, got.high) == pytest.approx((student.low, student.high)), "resamples of equal values"
    assert mean_p_value(np.arange(10.0) + 100) == pytest.approx(2 / 2001)


def test_a_paired_bootstrap_draws_seeds_and_takes_all_methods_along():
    rng = np.random.default_rng(4)
    shared = rng.normal(0, 10, (12, 1))
    own, other = shared + rng.normal(1, 0.1, (12, 5)), shared + rng.normal(0, 0.1, (12, 5))
    paired = bootstrap_runs((own, other), lambda one, two: one.mean() - two.mean())
    of_differences = bootstrap_runs(own - other, np.mean)
    assert (paired.low, paired.high) == pytest.approx((of_differences.low, of_differences.high))
    assert paired.high - paired.low < 0.2  # the seeds' spread of 10 cancels
    with pytest.raises(ValueError, match=r"different numbers of runs: \[12, 11\]"):
        bootstrap_runs((own, other[1:]), lambda one, two: one.mean() - two.mean())


def test_bands_are_intervals_at_each_point():
    runs = np.random.default_rng(5).standard_normal((11, 4))
    band = bootstrap_band(runs, lambda each: each.mean(axis=0), resamples=200, level=0.9)
    for point in range(4):
        alone = bootstrap_runs(runs[:, point], np.mean, resamples=200, level=0.9)
        got = (band.estimate[point], band.low[point], band.high[point])
        assert got == pytest.approx((alone.estimate, alone.low, alone.high))
    fast = bootstrap_mean(runs, resamples=200, level=0.9)
    np.testing.assert_allclose([fast.estimate, fast.low, fast.high], [band.estimate, band.low, band.high])
    assert (fast.count, fast.level) == (11, 0.9)
    library = stats.bootstrap((runs,), np.mean, axis=0, method="percentile", confidence_level=0.9, rng=0)
    np.testing.assert_allclose(fast.low, library.confidence_interval.low, atol=0.12)
    np.testing.assert_allclose(fast.high, library.confidence_interval.high, atol=0.12)


def test_a_bootstrap_of_one_run_has_no_interval():
    one = bootstrap_runs(np.array([[3.0, 4.0]]), np.mean)
    assert one.estimate == 3.5
    assert np.isnan([one.low, one.high]).all()


def test_p_values_are_those_of_the_t_test():
    sample = np.random.default_rng(6).standard_normal(6) + 0.5
    assert mean_p_value(sample) == pytest.approx(stats.ttest_1samp(sample, 0).pvalue)
    assert (mean_p_value(sample) < 0.05) == mean_interval(sample).excludes_zero
    assert np.isnan(mean_p_value([1.0]))
    assert np.isnan(mean_p_value([1.0, np.nan]))
    assert mean_p_value([2.0, 2.0]) == 0
    assert mean_p_value([0.0, 0.0]) == 1


def test_geometric_mean_of_ratios():
    got = geometric_mean_interval([0.5, 2.0, 4.0])
    assert got.estimate == pytest.approx(4 ** (1 / 3))
    assert got.low * got.high == pytest.approx(got.estimate**2)
    inverse = geometric_mean_interval([2.0, 0.5, 0.25])
    assert (inverse.low, inverse.high) == pytest.approx((1 / got.high, 1 / got.low))


def test_proportions_cover_at_least_as_often_as_they_say():
    for count, truth in ((5, 0.5), (7, 0.8), (20, 0.95)):
        wins = np.arange(count + 1)
        holds = [(got := proportion_interval(int(k), count)).low <= truth <= got.high for k in wins]
        assert stats.binom.pmf(wins, count, truth)[holds].sum() >= 0.95


def test_ties_widen_the_interval_to_both_ways_of_breaking_them():
    tie = proportion_interval(3.5, 6)
    assert tie.estimate == pytest.approx(3.5 / 6)
    assert (tie.low, tie.high) == (proportion_interval(3, 6).low, proportion_interval(4, 6).high)
    assert np.isnan(proportion_interval(0, 0).estimate)
