import numpy as np
import pandas as pd
import pytest

from analysis.convergence_summary import clock_warning, convergence_sentences
from tests.analysis.tidy import tidy

FALLING = np.array([4.0, 3.0, 2.0, 1.0])


def said(**values):
    """The sentences on dtr, of curves that are the same in all quarters and have no intervals."""
    return sentences(tidy(**values))


def sentences(frame):
    parts = [frame, *(frame.assign(metric=f"loss/val_{name}_noise") for name in ("low", "high"))]
    return convergence_sentences(pd.concat(parts, ignore_index=True), "baseline", ["dtr"])


def pairs(*gaps, slower=0.0):
    """Curves of so many seeds, in which dtr is lower by these."""
    values = {f"baseline_{seed}": FALLING + 0.1 * seed for seed in range(len(gaps))}
    return values | {f"dtr_{seed}": FALLING + 0.1 * seed - gap for seed, gap in enumerate(gaps)}


def test_a_clear_win_is_said_with_every_uncertainty():
    loss, speed, area, parts = said(**pairs(0.5, 0.4, 0.45, 0.5, 0.55, 0.6))
    assert loss.startswith(
        "DTR ends lower than Baseline, by 0.5 (40.0%) in final validation loss (95 % paired interval ["
    )
    assert "6 seeds: -0.5, -0.4, " in loss
    assert loss.endswith("It is lower in 6 of 6 seeds: probability of improvement 1.00 [0.54, 1.00].")
    assert speed.startswith("DTR reached the final loss of Baseline 1.14x as fast (95 % interval [1.1")
    assert speed.endswith("seeds: 1.14, 1.11, 1.13, 1.14, 1.16, 1.18).")
    assert area.startswith("Averaged over training, as far as both were measured, the loss of DTR is 0.5 lower than")
    assert "that of Baseline [-0.5" in area
    assert "not resolved" not in area + parts


def test_two_seeds_are_a_hint_even_if_their_interval_excludes_zero():
    loss, speed, area, parts = said(**pairs(0.5, 0.501))
    assert "a hint from too few seeds to claim it" in loss
    assert "a hint from too few seeds to claim it" in speed
    assert "which this count alone cannot tell from one half" in loss
    assert area.endswith("], not resolved: 2 seeds are too few.")
    assert parts.count("not resolved") == 2


def test_one_pair_says_no_more_than_it_is():
    loss, speed = said(**pairs(0.5))
    assert "one pair is no evidence" in loss
    assert "probability" not in loss
    assert speed == "DTR reached the final loss of Baseline in 88% of the steps, in one seed."


def test_runs_that_never_arrived_leave_bounds():
    _, speed, *_ = said(**pairs(0.5, -0.5, 0.4, 0.5))
    assert "final loss of Baseline in 3 of 4 seeds within its training, 1.14, 1.11, 1.14 times as fast there" in speed
    assert "the median over all of them is 1.13x. To the loss that Baseline has after three quarters" in speed
    assert "which the seeds cannot tell from 1" in speed
    _, speed, *_ = said(**pairs(-1.5, -1.5, -1.5))
    assert "in 0 of 3 seeds within its training. To the loss" in speed
    assert speed.endswith("it is at most 0.75x as fast, in the mean of these seeds.")


def test_many_seeds_are_counted_not_listed():
    loss, speed, *_ = said(**pairs(*np.linspace(0.4, 0.6, 12)))
    assert "12 seeds)" in loss
    assert "seeds: 12)" in speed


def timed(frame, **seconds_per_step):
    return frame.assign(
        seconds=frame["step"] * frame["method"].map(seconds_per_step).astype(float),
        samples=frame["step"],
        flops=np.nan,
    )


def test_a_ranking_that_turns_with_what_is_held_equal_is_said():
    frame = tidy(**pairs(0.3, 0.25, 0.35))
    assert len(sentences(timed(frame, baseline=1.0, dtr=1.0))) == 4
    turned = sentences(timed(frame, baseline=1.0, dtr=2.0))[-1]
    assert turned.startswith(
        "The ranking depends on what is held equal: DTR is lower than Baseline at equal steps (-0.3 [-0.424, -0.176]), "
        "but higher at equal training time (+1.7 ["
    )
    assert "samples" not in turned
    unknown = timed(frame, baseline=1.0, dtr=np.nan)
    assert len(sentences(unknown)) == 4


def test_an_interval_that_holds_zero_is_not_blamed_on_the_number_of_seeds():
    area = said(**pairs(0.5, -0.5))[-2]
    assert area.endswith("], not resolved.")


def test_two_open_differences_on_either_side_are_no_reversal():
    frame = tidy(**pairs(0.3, 0.29))
    turned = timed(frame, baseline=1.0, dtr=2.0)
    assert not any("held equal" in sentence for sentence in sentences(turned))  # two seeds resolve nothing
    one_open = sentences(timed(tidy(**pairs(0.3, -0.2, 0.3)), baseline=1.0, dtr=2.0))[-1]
    assert "at equal steps (-0.133 [" in one_open
    assert "not resolved), but higher at equal training time (+1.8" in one_open


def test_a_diverged_run_is_said_and_nothing_else_is_claimed_of_it():
    values = pairs(0.5, 0.4, 0.45)
    values["dtr_1"] = [4, 3, np.nan, np.nan]
    found = said(**values)
    assert found[0] == "DTR or Baseline diverged in 1 of 3 seeds: see the table of runs."
    assert "in 2 of 3 seeds within its training" in found[1]
    assert len(found) == 2


def test_intervals_are_counted_after_adjustment():
    frame = tidy(**pairs(0.5, 0.4, 0.45))
    labels = ["t000-049", "t050-099"]
    worse = frame.assign(value=frame["value"] + 2 * (frame["method"] == "dtr"))
    own = [part.assign(metric=f"loss/val_{label}") for part, label in zip((frame, worse), labels, strict=True)]
    found = convergence_sentences(pd.concat([frame, *own], ignore_index=True), "baseline", ["dtr"])[-1]
    assert found == (
        "Of 2 timestep intervals DTR ends lower than Baseline in 1 (t000-049) and higher in 1 (t050-099); the others "
        "are not resolved (false discovery rate 5 % over intervals)."
    )


@pytest.mark.parametrize(("slow", "warned"), [(1.2, False), (2.0, True)])
def test_uneven_clocks_are_warned_of(slow, warned):
    frame = timed(tidy(**pairs(0.5, 0.4)), baseline=1.0, dtr=5.0)
    frame.loc[frame["run"] == "dtr_1", "seconds"] *= slow
    warning = clock_warning(frame)
    assert (warning is not None) == warned
    assert not warned or "by a factor of up to 2.0 in their time per step" in warning


def test_there_is_no_clock_to_warn_of():
    frame = tidy(**pairs(0.5, 0.4))
    assert clock_warning(timed(frame, baseline=1.0, dtr=np.nan)) is None
    assert clock_warning(timed(frame, baseline=np.nan, dtr=np.nan)) is None


def test_runs_of_different_lengths_are_compared_where_the_shorter_stops_and_that_is_said():
    values = pairs(0.5, 0.4, 0.45)
    shorter = values | {f"baseline_{seed}": values[f"baseline_{seed}"][:2] for seed in range(3)}
    assert said(**shorter)[0].startswith("Compared where the shorter run of each seed stops: DTR ends lower than")
    assert said(**values)[0].startswith("DTR ends lower than")
