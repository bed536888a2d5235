import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import arrivals
from analysis.arrivals import arrival_profile, median_arrivals
from tests.analysis.tidy import tidy


def reached(times, arrived, method="dtr", axis="step"):
    table = {"method": method, "seed": range(len(times)), "threshold": 1.0, axis: times, "arrived": arrived}
    return pd.DataFrame(table)


# Freireich et al. (1963), weeks of remission under 6-mercaptopurine: the textbook case of Kaplan and Meier's estimate.
WEEKS = [6, 6, 6, 7, 10, 13, 16, 22, 23, 6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
RELAPSED = [True] * 9 + [False] * 12


def test_kaplan_meier_against_the_textbook():
    profile = arrival_profile(reached(WEEKS, RELAPSED)).set_index("step")
    known = {6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448}
    np.testing.assert_allclose(1 - profile.loc[list(known), "fraction"], list(known.values()), atol=5e-4)
    assert profile.loc[[6, 7, 10, 23], "followed"].tolist() == [21, 17, 15, 6]
    assert profile["ended"].sum() == 12
    assert profile.loc[32, "ended"] == 2
    # Greenwood: the standard error of log(-log S) at 6 weeks is sqrt(3 / (21 * 18)) / |log 0.857|.
    centre, error = np.log(-np.log(18 / 21)), np.sqrt(3 / (21 * 18)) / -np.log(18 / 21)
    ends = 1 - np.exp(-np.exp(centre + stats.norm.ppf([0.025, 0.975]) * error))
    np.testing.assert_allclose(profile.loc[6, ["low", "high"]].astype(float), ends, rtol=1e-6)
    median = median_arrivals(reached(WEEKS, RELAPSED)).loc["dtr"]
    assert median[["median", "low"]].tolist() == [23, 13]  # as SAS and R print it
    assert median["high"] == np.inf
    assert median[["arrived", "runs"]].tolist() == [9, 21]


def test_kaplan_meier_by_hand():
    """4 runs: one arrives at 100, one ends at 200, one arrives at 300, one ends at 400."""
    profile = arrival_profile(reached([300, 100, 200, 400], [True, True, False, False]))
    assert profile["step"].tolist() == [0, 100, 200, 300, 400]
    np.testing.assert_allclose(profile["fraction"], [0, 1 / 4, 1 / 4, 1 - 3 / 4 * 1 / 2, 1 - 3 / 8])
    assert profile["followed"].tolist() == [4, 4, 3, 2, 1]
    assert profile["ended"].tolist() == [0, 0, 1, 0, 1]
    assert (profile["low"] <= profile["fraction"]).all()
    assert (profile["fraction"] <= profile["high"]).all()


def test_where_nobody_or_everybody_has_arrived_the_interval_is_exact():
    none = arrival_profile(reached([100, 100, 100], [False] * 3))
    assert none["fraction"].tolist() == [0, 0]
    assert none["high"].tolist() == pytest.approx([1 - 0.025 ** (1 / 3)] * 2)
    everybody = arrival_profile(reached([100, 200], [True, True])).iloc[-1]
    assert everybody["fraction"] == 1
    assert (everybody["low"], everybody["high"]) == pytest.approx((0.025**0.5, 1))
    assert arrival_profile(reached([], [])).empty


def test_median_is_the_ordinary_one_without_censoring_and_never_hides_it():
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 8):
        times = rng.permutation(100)[:count] + 1.0
        assert median_arrivals(reached(times, [True] * count))["median"].item() == pytest.approx(np.median(times))
        # All that are censored end last: they count as later than all others.
        for late in range(1, count):
            arrived = np.arange(count) < count - late
            got = median_arrivals(reached(np.sort(times), arrived))["median"].item()
            assert got == np.median(np.where(arrived, np.sort(times), np.inf))


def test_methods_come_in_order_and_on_any_axis():
    table = pd.concat([reached([9.0], [True], axis="seconds"), reached([5.0], [True], "baseline", "seconds")])
    assert median_arrivals(table).index.tolist() == ["baseline", "dtr"]
    assert "seconds" in arrival_profile(table)


def test_coverage_of_the_arrival_profile_by_simulation():
    """Exponential times, cut at a budget: what arrives by then is known."""
    rng = np.random.default_rng(1)
    truth, covered = 1 - np.exp(-1.0), []
    for _ in range(150):
        times = rng.exponential(size=25)
        budget = rng.uniform(0.8, 2.0, 25)
        profile = arrival_profile(reached(np.minimum(times, budget), times <= budget))
        row = profile[profile["step"] <= 1.0].iloc[-1]
        covered.append(row["low"] <= truth <= row["high"])
    assert 0.9 < np.mean(covered) < 0.99


def test_thresholds_fixed_or_by_seed_on_any_axis():
    frame = tidy(baseline_0=[8, 6, 5, 4], baseline_1=[9, 7, 6, 5], dtr_0=[6, 4, 3, 2], dtr_1=[9, 8, 7, 6])
    frame["seconds"] = frame["step"] * 0.5
    fixed = arrivals.arrivals(frame, "loss/val", 6.0, "seconds")
    assert fixed.columns.tolist() == ["method", "seed", "threshold", "seconds", "arrived"]
    assert fixed["seconds"].tolist() == [100, 150, 50, 200]
    assert fixed["arrived"].all()
    final = arrivals.steps_to_baseline(frame, "loss/val", axis="seconds").set_index(["method", "seed"])
    assert final.loc[("dtr", 0)].tolist() == [4.0, 100.0, True]
    assert final.loc[("dtr", 1)].tolist() == [5.0, 200.0, False]


def test_an_earlier_threshold_is_the_baselines_own_value_then():
    frame = tidy(baseline_0=[8, 6, 4, 2], dtr_0=[8, 7, 6, 5])
    got = arrivals.steps_to_baseline(frame, "loss/val", share=0.625).set_index("method")
    assert got.loc["baseline"].tolist() == [0, 5.0, 250.0, True]  # 0.625 of 400 steps: between 6 and 4
    assert got.loc["dtr"].tolist() == [0, 5.0, 400.0, True]
