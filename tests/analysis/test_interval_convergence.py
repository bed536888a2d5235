import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import convergence
from analysis.interval_convergence import interval_convergence, interval_metrics, relative_differences
from tests.analysis.tidy import tidy

LABELS = [f"t{low:03d}-{low + 9:03d}" for low in range(0, 60, 10)]


def noisy(effects, seeds=5, seed=0):
    """Curves of six intervals that fall to 1, in which dtr ends lower by these effects, with noise of 0.05."""
    rng = np.random.default_rng(seed)
    pieces = []
    for label, effect in zip(LABELS, effects, strict=True):
        values = {}
        for run in range(seeds):
            values[f"baseline_{run}"] = np.array([4, 2, 1.5, 1]) + rng.normal(0, 0.05)
            values[f"dtr_{run}"] = np.array([4, 2, 1.5, 1]) - effect + rng.normal(0, 0.05)
        pieces.append(tidy(metric=f"loss/val_{label}", **values))
    return pd.concat([*pieces, tidy(baseline_0=[1]), tidy(metric="loss/val_low_noise", baseline_0=[1])])


def test_intervals_are_known_from_other_metrics_and_come_in_order():
    frame = noisy([0] * 6).iloc[::-1]
    assert list(interval_metrics(frame)) == LABELS
    assert interval_metrics(frame)["t010-019"] == "loss/val_t010-019"
    assert interval_metrics(tidy(baseline_0=[1])) == {}


def test_every_row_is_what_the_comparison_of_its_interval_gives():
    frame = noisy([0, 0.3, 0, -0.3, 0.1, 0])
    table = interval_convergence(frame).set_index(["interval", "quantity"])
    assert len(table) == 6 * 4
    metric, rows = "loss/val_t010-019", table.loc["t010-019"]
    found = {
        "difference": convergence.paired_difference(frame, metric, "dtr")[1],
        "area_difference": convergence.area_difference(frame, metric, "dtr")[1],
        "probability": convergence.probability_of_improvement(frame, metric, "dtr"),
        "speed_up": convergence.speed_up(convergence.steps_to_baseline(frame, metric), "dtr").interval,
    }
    for quantity, interval in found.items():
        got = rows.loc[quantity, ["estimate", "low", "high"]].astype(float)
        np.testing.assert_allclose(got, [interval.estimate, interval.low, interval.high])
    final = convergence.paired_values(frame, metric, "dtr")
    assert rows.loc["difference", "p_value"] == pytest.approx(stats.ttest_rel(final["own"], final["reference"]).pvalue)
    assert rows.loc["probability", "p_value"] == pytest.approx(stats.binomtest(5, 5).pvalue)
    assert rows["reference"].tolist() == pytest.approx([final["reference"].mean()] * 4)
    assert rows.loc["speed_up", "arrived"] == rows.loc["speed_up", "pairs"] == 5
    assert rows["task"].eq(1).all()


def test_a_speed_up_that_is_only_bounded_is_not_tested_and_says_what_is_known():
    row = interval_convergence(noisy([-0.3] * 6)).set_index(["interval", "quantity"]).loc[(LABELS[0], "speed_up")]
    assert row[["estimate", "low", "high", "p_value", "q_value"]].isna().all()
    assert not row["significant"]
    assert (row["at_least"], row["at_most"], row["arrived"]) == (0, 1, 0)
    early = interval_convergence(noisy([-0.3] * 6), share=0.5).set_index(["interval", "quantity"])
    row = early.loc[(LABELS[0], "speed_up")]
    assert 0 < row["low"] < row["estimate"] < row["high"] < 1  # to the baseline's loss at half of its steps all arrive
    assert row["at_least"] == row["at_most"] == row["estimate"]


def test_p_values_are_adjusted_over_the_intervals_of_a_method_and_quantity():
    frame = noisy([0, 0.3, 0.05, -0.3, 0.1, 0])
    other = frame[frame["method"] == "dtr"].assign(method="random")
    table = interval_convergence(pd.concat([frame, other.assign(run=other["run"] + "r", value=other["value"] + 0.02)]))
    for _, family in table.groupby(["method", "quantity"]):
        known = family["p_value"].notna()
        expected = stats.false_discovery_control(family.loc[known, "p_value"])
        np.testing.assert_allclose(family.loc[known, "q_value"], expected)
        assert family.loc[~known, "q_value"].isna().all()
    assert (table["significant"] == (table["q_value"] <= 0.05)).all()
    found = table[(table["method"] == "dtr") & (table["quantity"] == "difference") & table["significant"]]
    assert set(found["interval"]) >= {LABELS[1], LABELS[3]}


def test_false_discoveries_are_controlled_where_nothing_differs():
    """Unadjusted, some of six intervals would be significant in a quarter of all comparisons."""
    found, single = [], []
    for seed in range(25):
        table = interval_convergence(noisy([0] * 6, seed=seed))
        rows = table[table["quantity"] == "difference"]
        found.append(rows["significant"].any())
        single.append((rows["p_value"] <= 0.05).any())
    assert np.mean(found) <= 0.1
    assert np.mean(single) > 0.15


def test_differences_relative_to_the_baseline_keep_their_tests():
    table = interval_convergence(noisy([0, 0.3, 0, -0.3, 0.1, 0]))
    scaled = relative_differences(table)
    rows = table["quantity"].isin(["difference", "area_difference"])
    for name in ("estimate", "low", "high"):
        np.testing.assert_allclose(scaled.loc[rows, name], table.loc[rows, name] / table.loc[rows, "reference"])
        pd.testing.assert_series_equal(scaled.loc[~rows, name], table.loc[~rows, name])
    pd.testing.assert_series_equal(scaled["q_value"], table["q_value"])


def test_one_pair_and_none():
    one = interval_convergence(noisy([0.3] * 6, seeds=1))
    assert one.loc[one["quantity"] == "difference", ["low", "p_value"]].isna().all(axis=None)
    assert not one["significant"].any()
    unpaired = noisy([0.3] * 6, seeds=1)
    unpaired.loc[unpaired["method"] == "dtr", "seed"] = 7
    assert interval_convergence(unpaired).empty
    assert interval_convergence(tidy(baseline_0=[1], dtr_0=[1])).empty
