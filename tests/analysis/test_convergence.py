import numpy as np
import pandas as pd
import pytest

from analysis import convergence
from analysis.convergence import Arrival, steps_to_threshold

STEPS = np.array([100, 200, 300, 400])


def curves(**values):
    """Tidy frame from ``method_seed=[...]`` on `STEPS`."""
    rows = []
    for name, series in values.items():
        method, seed = name.split("_")
        rows += [(name, method, int(seed), s, "loss/val", v) for s, v in zip(STEPS, series, strict=False)]
    return pd.DataFrame(rows, columns=["run", "method", "seed", "step", "metric", "value"])


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
    got = steps_to_threshold(STEPS, np.array(values, float), threshold)
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
    final = convergence.final_values(frame, "loss/val").set_index("method")["value"]
    assert final[["dtr", "random"]].isna().all()


def test_speed_up_is_paired_and_undefined_when_censored():
    frame = curves(
        baseline_0=[8, 6, 5, 4], baseline_1=[8, 6, 5, 4], dtr_0=[6, 4, 3, 2], dtr_1=[4, 3, 2, 1], random_0=[9, 9, 9, 9]
    )
    reached = convergence.steps_to_baseline(frame, "loss/val")
    ratio, interval = convergence.speed_up(reached, "dtr")
    assert ratio.tolist() == [2.0, 4.0]
    assert interval.estimate == pytest.approx(np.sqrt(8))
    ratio, interval = convergence.speed_up(reached, "random")
    assert ratio.tolist() == [1.0]
    assert np.isnan(interval.estimate)


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
    assert convergence.final_values(frame, "loss/val")["value"].tolist() == [1.0, 4.0]
