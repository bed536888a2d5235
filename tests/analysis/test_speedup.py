import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.speedup import speed_up, speed_up_curve
from analysis.uncertainty import mean_interval
from tests.analysis.tidy import tidy


def reached(baseline, method, budget=100.0):
    """Arrivals by seed; None is a run that never arrived by the budget."""
    rows = [
        (name, seed, 1.0, budget if time is None else time, time is not None)
        for name, times in (("baseline", baseline), ("dtr", method))
        for seed, time in enumerate(times)
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "threshold", "step", "arrived"])


def test_geometric_mean_with_a_t_interval_on_logarithms():
    baseline, method = np.array([90.0, 80, 100]), np.array([45.0, 64, 50])
    speed = speed_up(reached(baseline, method), "dtr")
    logs = np.log(baseline / method)
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert speed.interval.estimate == pytest.approx(np.exp(logs.mean()))
    assert (speed.interval.low, speed.interval.high) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    assert speed.mean_bounds == pytest.approx((speed.interval.estimate,) * 2)
    assert speed.median == pytest.approx(2.0)
    assert speed.ratios["low"].tolist() == pytest.approx([2, 1.25, 2])
    assert np.isnan(speed.median_interval).all()


def test_bounds_by_hand_where_runs_never_arrived():
    speed = speed_up(reached([90, 80, None, None], [45, None, 50, None]), "dtr")
    assert speed.ratios["low"].tolist() == [2, 0, 2, 0]
    assert speed.ratios["high"].tolist() == pytest.approx([2, 0.8, np.inf, np.inf])
    assert speed.mean_bounds == (0, np.inf)
    assert np.isnan(speed.interval.estimate)
    assert speed.interval.count == 4
    assert speed.median_bounds == (0, np.inf)
    assert np.isnan(speed.median)


def test_the_mean_is_bounded_on_the_side_that_is_known_and_the_median_where_the_others_determine_it():
    method_censored = speed_up(reached([90, 80, 100], [45, None, 25]), "dtr")
    assert method_censored.mean_bounds == pytest.approx((0, (2 * 0.8 * 4) ** (1 / 3)))
    assert method_censored.median == pytest.approx(2)  # below it lies 0.8 at most, above it 4
    baseline_censored = speed_up(reached([90, None, 100], [45, 20, 25]), "dtr")
    assert baseline_censored.mean_bounds == pytest.approx(((2 * 5 * 4) ** (1 / 3), np.inf))
    assert baseline_censored.median == pytest.approx(4)


def test_bounds_hold_whatever_the_hidden_times_are():
    """Draw complete times, hide those beyond the budget, and look whether the bounds hold the complete answer."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        baseline, method = rng.uniform(20, 160, (2, 5))
        hidden = [[time if time <= 100 else None for time in times] for times in (baseline, method)]
        speed = speed_up(reached(*hidden), "dtr")
        logs = np.log(baseline / method)
        for truth, (low, high) in ((logs.mean(), speed.mean_bounds), (np.median(logs), speed.median_bounds)):
            assert low * (1 - 1e-9) <= np.exp(truth) <= high * (1 + 1e-9)
        complete = None not in hidden[0] + hidden[1]
        assert np.isfinite(speed.interval.estimate) == complete


def test_from_ten_seeds_on_whole_runs_are_resampled():
    rng = np.random.default_rng(3)
    baseline = rng.uniform(80, 100, 10)
    speed = speed_up(reached(baseline, baseline / rng.lognormal(0.3, 0.2, 10)), "dtr")
    logs = np.log(speed.ratios["low"].to_numpy())
    expected = mean_interval(logs)
    np.testing.assert_allclose(np.log([speed.interval.low, speed.interval.high]), [expected.low, expected.high])
    student = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert np.log(speed.interval.low) != pytest.approx(student.low, abs=1e-6)
    draws = np.median(logs[np.random.default_rng(0).integers(10, size=(2000, 10))], axis=1)
    np.testing.assert_allclose(
        np.log(speed.median_interval),
        [np.quantile(draws, 0.025, method="lower"), np.quantile(draws, 0.975, method="higher")],
    )


def test_the_interval_of_the_median_holds_with_runs_that_never_arrived():
    """Of the truth's medians, with three in ten runs hidden on average."""
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(150):
        baseline, method = rng.lognormal(4.0, 0.3, (2, 15)) * [[1.0], [0.8]]
        hidden = [[time if time <= 65 else None for time in times] for times in (baseline, method)]
        low, high = speed_up(reached(*hidden, budget=65.0), "dtr").median_interval
        covered.append(low <= 1.25 <= high)
    assert np.mean(covered) > 0.9
    nobody = speed_up(reached([90.0] * 10, [None] * 10), "dtr")
    assert nobody.median_interval == pytest.approx((0, 100 / 100 * 0.9))
    both = speed_up(reached([None] * 10, [None] * 10), "dtr")
    assert both.median_interval == (0, np.inf)


def test_only_seeds_of_both_count_and_a_threshold_of_the_start_leaves_the_ratio_open():
    table = reached([90, 80], [45])
    assert speed_up(table, "dtr").ratios.index.tolist() == [0]
    assert speed_up(table, "absent").ratios.empty
    for there in ([0.0], [0.0]), ([50.0], [0.0]), ([0.0], [50.0]):
        open_pair = speed_up(reached(*there), "dtr")
        assert open_pair.ratios.to_numpy().tolist() == [[0, np.inf]]
        assert np.isnan(open_pair.interval.estimate)
    nothing = speed_up(reached([90], [None], budget=0.0), "dtr")  # ended before its first step
    assert nothing.ratios.to_numpy().tolist() == [[0, np.inf]]


def test_a_method_twice_as_fast_is_so_at_every_threshold():
    steps = np.arange(0, 401, 50)
    frame = tidy(
        steps=steps,
        baseline_0=10 - steps / 100,
        baseline_1=20 - steps / 50,
        dtr_0=10 - 2 * steps / 100,
        dtr_1=20 - 2 * steps / 50,
        random_0=10 - steps / 200,
    )
    # The first measurement is at the start itself, where both are level.
    got = speed_up_curve(frame[frame["step"] > 0], "loss/val", "dtr", points=5)
    assert got["step"].tolist() == pytest.approx(np.linspace(100, 400, 5))  # where the baseline is at dtr's first loss
    np.testing.assert_allclose(got[["estimate", "at_least", "at_most", "median"]], 2.0)
    assert got["threshold"].iloc[-1] == pytest.approx((6 + 12) / 2)
    assert (got["arrived"] == 2).all()
    late = speed_up_curve(frame[frame["step"] > 0], "loss/val", "random", points=4)
    assert late["step"].tolist() == pytest.approx([50, 50 + 350 / 3, 50 + 700 / 3, 400])
    # Half as fast: what the baseline reaches after half of its steps comes at the end, all below never.
    assert late["arrived"].tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(late["estimate"], [0.5, 0.5, np.nan, np.nan])
    np.testing.assert_allclose(late["at_most"], [0.5, 0.5, (50 + 700 / 3) / 400, 1.0])


def test_there_is_no_curve_without_a_pair_or_a_common_range():
    frame = tidy(baseline_0=[8, 6, 5, 4], dtr_1=[8, 6, 5, 4], random_0=[3, 2, 1, 1])
    assert speed_up_curve(frame, "loss/val", "dtr").empty
    assert speed_up_curve(frame, "loss/val", "random").empty  # below where the baseline ends from the first measurement
