import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import convergence
from analysis.convergence import Arrival, steps_to_threshold
from analysis.uncertainty import bootstrap_band
from tests.analysis.tidy import STEPS
from tests.analysis.tidy import tidy as curves


@pytest.mark.parametrize(
    ("values", "threshold", "expected"),
    [
        ([4, 3, 2, 1], 2.5, Arrival(250.0, True)),  # halfway between 3 and 2
        ([4, 3, 2, 1], 3.0, Arrival(200.0, True)),  # exactly reached
        ([4, 3, 2, 1], 5.0, Arrival(100.0, True)),  # from the start: no extrapolation before the first measurement
        ([4, 3, 2, 1], 0.5, Arrival(400.0, False)),  # never: censored at the last step
        ([4, 1, 3, 1], 2.0, Arrival(100 + 200 / 3, True)),  # the first crossing counts
        ([4, np.nan, 1, 1], 2.0, Arrival(300.0, True)),  # nothing to interpolate from
        ([np.nan] * 4, 2.0, Arrival(400.0, False)),
    ],
)
def test_steps_to_threshold_by_hand(values, threshold, expected):
    got = steps_to_threshold(np.array(STEPS), np.array(values, float), threshold)
    assert got.arrived == expected.arrived
    assert got.step == pytest.approx(expected.step)


def test_an_empty_curve_is_refused():
    with pytest.raises(ValueError, match="empty curve"):
        steps_to_threshold(np.array([], int), np.array([]), 1.0)


def test_steps_to_baseline_pairs_seeds_and_keeps_censored_runs():
    frame = curves(
        baseline_0=[8, 6, 5, 4], baseline_1=[9, 7, 6, 5], dtr_0=[6, 4, 3, 2], dtr_1=[9, 8, 7, 6], dtr_2=[1, 1, 1, 1]
    )
    got = convergence.steps_to_baseline(frame, "loss/val").set_index(["method", "seed"])
    assert got.loc[("baseline", 0)].tolist() == [4.0, 400.0, True]
    assert got.loc[("dtr", 0)].tolist() == [4.0, 200.0, True]
    assert got.loc[("dtr", 1)].tolist() == [5.0, 400.0, False]
    assert ("dtr", 2) not in got.index  # no baseline with this seed
    assert len(got) == 4


def test_a_diverged_run_is_censored_not_dropped():
    frame = curves(baseline_0=[8, 6, 5, 4], dtr_0=[np.nan] * 4, random_0=[8, 6, np.nan, np.nan])
    got = convergence.steps_to_baseline(frame, "loss/val").set_index("method")
    assert got.loc["dtr", ["step", "arrived"]].tolist() == [400.0, False]
    assert not got.loc["random", "arrived"]
    assert convergence.paired_values(frame, "loss/val", "random")["own"].isna().all()


def test_speed_up_is_paired_and_undefined_when_censored():
    frame = curves(
        baseline_0=[8, 6, 5, 4], baseline_1=[8, 6, 5, 4], dtr_0=[6, 4, 3, 2], dtr_1=[4, 3, 2, 1], random_0=[9, 9, 9, 9]
    )
    reached = convergence.steps_to_baseline(frame, "loss/val")
    speed = convergence.speed_up(reached, "dtr")
    assert speed.ratios["low"].tolist() == [2.0, 4.0]
    assert speed.interval.estimate == pytest.approx(np.sqrt(8))
    censored = convergence.speed_up(reached, "random")
    assert censored.ratios["high"].tolist() == [1.0]
    assert np.isnan(censored.interval.estimate)


def test_paired_difference_removes_what_seeds_share():
    frame = curves(baseline_0=[4], baseline_1=[8], baseline_2=[6], dtr_0=[3.9], dtr_1=[7.8], dtr_2=[5.9], dtr_3=[0])
    difference, interval = convergence.paired_difference(frame, "loss/val", "dtr")
    np.testing.assert_allclose(difference, [-0.1, -0.2, -0.1])
    assert interval.estimate == pytest.approx(-0.4 / 3)
    assert interval.count == 3
    # By hand: s = 0.057735, t(0.975, 2) = 4.30265, half width 0.143422.
    assert interval.high - interval.estimate == pytest.approx(0.143422, rel=1e-4)
    assert convergence.paired_difference(frame, "loss/val", "absent")[1].count == 0


def test_aligned_curves_interpolate_inside_a_run_only():
    frame = curves(baseline_0=[4, 3, 2, 1], dtr_0=[4.0])
    late = pd.DataFrame(
        [("d", "dtr", 0, 300, "loss/val", 2.0)], columns=["run", "method", "seed", "step", "metric", "value"]
    )
    got = convergence.aligned_curves(pd.concat([frame, late]), "loss/val")
    assert got["dtr", 0].tolist()[:3] == [4.0, 3.0, 2.0]
    assert np.isnan(got["dtr", 0].iloc[3])


def test_aligned_curves_on_other_axes():
    frame = curves(baseline_0=[4, 3, 2, 1], dtr_0=[4, 3, 2, 1])
    frame["seconds"] = frame["step"] * np.where(frame["method"] == "dtr", 0.5, 1.0)
    got = convergence.aligned_curves(frame, "loss/val", "seconds")
    assert got.index.name == "seconds"
    assert got.index.tolist() == [50, 100, 150, 200, 300, 400]
    np.testing.assert_allclose(got["dtr", 0], [4, 3, 2, 1, np.nan, np.nan])
    np.testing.assert_allclose(got["baseline", 0], [np.nan, 4, 3.5, 3, 2, 1])
    assert convergence.aligned_curves(frame, "absent").empty


def test_aligned_curves_show_where_a_run_diverged():
    got = convergence.aligned_curves(curves(baseline_0=[4, 3, 2, 1], dtr_0=[4, 3, np.nan, np.nan]), "loss/val")
    np.testing.assert_array_equal(got["dtr", 0], [4, 3, np.nan, np.nan])


def test_runs_with_clocks_of_their_own_share_a_grid_of_bounded_size():
    steps = np.arange(1, 601)
    frame = curves(steps=steps, **{f"dtr_{seed}": 1 / steps for seed in range(4)})
    assert len(convergence.aligned_curves(frame, "loss/val")) == 600
    frame["seconds"] = frame["step"] * (1 + 0.01 * frame["seed"])
    got = convergence.aligned_curves(frame, "loss/val", "seconds")
    assert len(got) == 1000
    assert (got.index[0], got.index[-1]) == (1.0, pytest.approx(618))


STAIRS = np.where(np.arange(60) < 30, 5.0, 1.0)


def smoothed(x, value, bandwidth):
    return convergence.smoothed_curves(curves(steps=x, dtr_0=value), "loss/val", bandwidth)["dtr", 0]


def test_the_smoother_leaves_a_straight_line_alone_at_both_ends_and_across_gaps():
    rng = np.random.default_rng(0)
    x = np.unique(rng.integers(0, 5000, 80))
    line = 7 - 0.001 * x
    gappy = np.where(np.isin(np.arange(len(x)), [10, 11, 40]), np.nan, line)
    for bandwidth in (1.0, 50.0, 1e6):
        np.testing.assert_allclose(smoothed(x, line, bandwidth), line, rtol=1e-9)
        np.testing.assert_allclose(smoothed(x, gappy, bandwidth), gappy, rtol=1e-9)


def test_the_smoother_does_not_lag():
    """A step's midpoint stays where it was; an exponential moving average of the same width shifts it."""
    x = np.arange(60)
    found = smoothed(x, STAIRS, 4.0)
    assert np.interp(-3.0, -found, x) == pytest.approx(29.5)
    np.testing.assert_allclose(found.to_numpy() + found.to_numpy()[::-1], 6.0)
    average = pd.Series(STAIRS).ewm(com=4).mean()
    assert np.interp(-3.0, -average, x) > 31.5


def test_the_smoother_is_a_weighted_fit_of_lines():
    rng = np.random.default_rng(1)
    x = np.sort(rng.choice(1000, 40, replace=False))
    value = np.sin(x / 150) + rng.normal(0, 0.1, 40)
    got = smoothed(x, value, 60.0)
    for at in (0, 7, 20, 39):
        weight = np.exp(-((x - x[at]) ** 2) / (2 * 60.0**2))
        line = np.polyfit(x - x[at], value, 1, w=np.sqrt(weight))
        assert got.iloc[at] == pytest.approx(line[1], rel=1e-9)


def test_the_smoother_invents_nothing():
    frame = curves(dtr_0=[4, 3, 2, 1], dtr_1=[4, np.nan, np.nan, np.nan], random_0=[3, 2])
    got = convergence.smoothed_curves(frame, "loss/val", 100.0)
    assert got["dtr", 1].isna().tolist() == [False, True, True, True]
    assert got["random", 0].isna().tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="bandwidth must be positive, not 0"):
        convergence.smoothed_curves(frame, "loss/val", 0)


def test_bands_of_few_seeds_are_their_range_and_of_many_a_bootstrap():
    rng = np.random.default_rng(2)
    many = {f"dtr_{seed}": rng.normal(5, 1, 4) for seed in range(10)}
    frame = curves(baseline_0=[4, 3, 2, 1], baseline_1=[6, 5, 2, np.nan], **many)
    aligned = convergence.aligned_curves(frame, "loss/val")
    bands = convergence.curve_bands(aligned).set_index("method")
    few = bands.loc["baseline"]
    assert few[["step", "mean", "low", "high"]].to_numpy().tolist() == [[100, 5, 4, 6], [200, 4, 3, 5], [300, 2, 2, 2]]
    assert few["band"].eq("range").all()
    assert few["seeds"].eq(2).all()
    wide = bands.loc["dtr"]
    values = np.array(list(many.values()))
    expected = bootstrap_band(values, lambda runs: runs.mean(axis=0))
    np.testing.assert_allclose(wide["mean"], values.mean(axis=0))
    np.testing.assert_allclose(wide[["low", "high"]].T, [expected.low, expected.high])
    assert wide["band"].eq("bootstrap").all()


def test_paired_values_are_at_equal_cost():
    frame = curves(baseline_0=[8, 6, 5, 4], dtr_0=[6, 5, 3], baseline_1=[8, 6, 5, 4], dtr_1=[7, 6, 5, 3])
    by_step = convergence.paired_values(frame, "loss/val", "dtr")
    assert by_step.to_numpy().tolist() == [[3, 5], [3, 4]]  # the first pair ends where dtr does
    frame["seconds"] = frame["step"] * np.where(frame["method"] == "dtr", 2.0, 1.0)
    by_time = convergence.paired_values(frame, "loss/val", "dtr", axis="seconds")
    assert by_time.to_numpy().tolist() == [[5, 4], [6, 4]]  # after 400 seconds dtr has made 200 steps
    difference, interval = convergence.paired_difference(frame, "loss/val", "dtr", axis="seconds")
    assert difference.tolist() == [1, 2]
    assert interval.estimate == 1.5


def test_curves_that_do_not_overlap_are_no_pair():
    late = curves(steps=(300, 400), dtr_0=[2, 1])
    frame = pd.concat([curves(baseline_0=[4, 3]), late])
    assert convergence.paired_values(frame, "loss/val", "dtr").empty


def test_probability_of_improvement_counts_pairs():
    frame = curves(
        **{f"baseline_{seed}": [value] for seed, value in enumerate([4, 4, 4, 4, np.nan, np.nan, 4])},
        **{f"dtr_{seed}": [value] for seed, value in enumerate([3, 3, 4, 5, 9, np.nan, np.nan])},
        dtr_7=[0],
    )
    got = convergence.probability_of_improvement(frame, "loss/val", "dtr")
    # Won: 0, 1, 4 (the other diverged); ties: 2, 5 (both diverged); lost: 3, 6 (diverged). Seed 7 has no partner.
    assert got.estimate == pytest.approx((3 + 2 / 2) / 7)
    assert got.count == 7
    exact = stats.binomtest(4, 7).proportion_ci(method="exact")
    assert (got.low, got.high) == pytest.approx((exact.low, exact.high))


def test_five_wins_of_five_do_not_exclude_a_coin():
    for count in (5, 6):
        pairs = {f"{name}_{seed}": [value] for seed in range(count) for name, value in (("baseline", 2), ("dtr", 1))}
        got = convergence.probability_of_improvement(curves(**pairs), "loss/val", "dtr")
        assert got.estimate == 1
        assert got.excludes(0.5) == (count == 6)


def test_area_against_closed_forms():
    x = np.linspace(100, 900, 2001)
    frame = curves(steps=x, baseline_0=3 + 0.01 * x, baseline_1=np.log(x), dtr_0=1 / x)
    area = convergence.area_under_curve(frame, "loss/val").set_index(["method", "seed"])["area"]
    assert area["baseline", 0] == pytest.approx(3 + 0.01 * 500)  # a line's mean is its middle
    assert area["dtr", 0] == pytest.approx(np.log(9) / 800, rel=1e-6)
    by_factor = convergence.area_under_curve(frame, "loss/val", log_axis=True).set_index(["method", "seed"])["area"]
    assert by_factor["baseline", 1] == pytest.approx(np.log(300), rel=1e-7)  # the middle of log 100 and log 900
    assert by_factor["dtr", 0] == pytest.approx((1 / 100 - 1 / 900) / np.log(9), rel=1e-5)


def test_area_ends_where_the_first_run_does_and_interpolates_at_a_budget():
    frame = curves(baseline_0=[4, 3, 2, 1], dtr_0=[4, 2, 0])
    area = convergence.area_under_curve(frame, "loss/val")["area"]
    assert area.tolist() == [3, 2]
    assert convergence.area_under_curve(frame, "loss/val", budget=150)["area"].tolist() == [3.75, 3.5]
    assert convergence.area_under_curve(frame, "loss/val", budget=100)["area"].tolist() == [4, 4]
    for budget in (50, 350):
        with pytest.raises(ValueError, match="have step 100 to 300 in common"):
            convergence.area_under_curve(frame, "loss/val", budget=budget)
    diverged = curves(baseline_0=[4, 3, 2, 1], dtr_0=[4, np.nan, np.nan, np.nan])
    assert convergence.area_under_curve(diverged, "loss/val")["area"].isna().tolist() == [False, True]
    assert convergence.area_under_curve(frame, "absent").empty


def test_area_differences_are_paired_and_of_two_methods_only():
    frame = curves(
        baseline_0=[4, 3, 2, 1], baseline_1=[8, 6, 4, 2], dtr_0=[3, 2, 1, 0], dtr_1=[8, 5, 2, 2], dtr_2=[1, 1, 1, 1],
        random_0=[9],
    )  # fmt: skip
    difference, interval = convergence.area_difference(frame, "loss/val", "dtr")
    assert difference.index.tolist() == [0, 1]
    # Trapezoids by hand: (3.5 + 2.5 + 1.5) / 3 = 2.5 and 5 of the baseline, 1.5 and 4 of dtr.
    assert difference.tolist() == pytest.approx([-1, -1])
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((-1, -1, -1))
    assert convergence.area_difference(frame, "loss/val", "absent")[1].count == 0


def test_a_run_that_ended_early_shortens_its_own_pair_alone():
    frame = curves(baseline_0=[4, 3, 2, 1], dtr_0=[3, 2, 1, 0], baseline_1=[8, 6, 4, 2], dtr_1=[7, 5])
    difference, _ = convergence.area_difference(frame, "loss/val", "dtr")
    assert difference.tolist() == pytest.approx([-1, -1])  # (7 + 5) / 2 - (8 + 6) / 2
    late = frame.assign(step=frame["step"].where((frame["method"] != "dtr") | (frame["seed"] != 1), 10_000))
    assert convergence.area_difference(late, "loss/val", "dtr")[0].index.tolist() == [0]


def test_a_logarithmic_axis_has_no_zero():
    frame = curves(baseline_0=[4, 3, 2], dtr_0=[3, 2, 1])
    frame["step"] -= frame["step"].min()
    with pytest.raises(ValueError, match="cannot begin at 0"):
        convergence.area_under_curve(frame, "loss/val", log_axis=True)


@pytest.mark.parametrize("statistic", ["difference", "area"])
def test_paired_intervals_cover(statistic):
    """Runs share what their seed brings, which is larger than the effect; five pairs give honest 95 % intervals."""
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(120):
        shared = rng.normal(5, 2, 5)
        values = {}
        for seed, (name, effect) in itertools.product(range(5), (("baseline", 0.0), ("dtr", -0.3))):
            values[f"{name}_{seed}"] = shared[seed] + effect + rng.normal(0, 0.2) + np.array([2.0, 1.0, 0.5, 0.0])
        find = convergence.paired_difference if statistic == "difference" else convergence.area_difference
        interval = find(curves(**values), "loss/val", "dtr")[1]
        covered.append(interval.low <= -0.3 <= interval.high)
    assert 0.9 <= np.mean(covered) <= 0.99
