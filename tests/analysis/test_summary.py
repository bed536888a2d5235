import json
import re

import numpy as np
import pytest

from analysis import summary as summary_module
from analysis.frames import curves_frame, runs_frame
from analysis.summary import comparability, readable
from tests.analysis import synthetic


def summary_frame(runs):
    return summary_module.summary_frame(runs_frame(runs), curves_frame(runs))


def verdict(runs):
    return summary_module.verdict(runs, summary_frame(runs), curves_frame(runs))


def changed(run, **fields):
    """The run with other manifest entries."""
    manifest = json.loads(run.attrs["manifest"]) | fields
    return run.assign_attrs(manifest=json.dumps(manifest))


def scaled(run, factor):
    """The run with its validation losses multiplied."""
    moment = run.val_loss.moment == "sum"
    names = ("val_loss", "val_quarter_loss", "val_timestep_loss")
    return run.assign({name: run[name].where(~moment, run[name] * factor) for name in names})


def test_summary_holds_the_known_truth(runs):
    summary = summary_frame(runs)
    assert list(summary.index) == ["baseline", "random", "dtr"]
    truth = [synthetic.val_loss("dtr", seed, 1000).mean() for seed in range(3)]
    assert summary.loc["dtr", "val_loss"] == pytest.approx(np.mean(truth))
    assert summary.loc["dtr", "val_loss_sd"] == pytest.approx(np.std(truth, ddof=1))
    assert summary.loc["dtr", "seeds"] == 3
    assert summary.loc["random", "steps_to_baseline"] == "not reached"
    assert summary.loc["random", ["arrived", "paired"]].tolist() == [0, 3]
    assert summary.loc["dtr", "arrived"] == 3
    steps = [float(text.replace(",", "")) for text in summary.loc["dtr", "steps_to_baseline"].split(", ")]
    # Curves are exponentials measured every 100 steps; interpolation lies above them, so arrival is a little late.
    np.testing.assert_allclose(steps, 1000 / synthetic.DTR_SPEED, rtol=0.06)
    assert summary.loc["dtr", "difference_high"] < 0 < summary.loc["random", "difference_low"]
    assert np.isnan(summary.loc["baseline", "difference"])


def test_verdict_says_who_wins_and_who_does_not(runs):
    said = verdict(runs)
    text = " ".join(said.findings)
    assert "DTR ends lower than Baseline" in text
    assert "Random routing ends higher than Baseline" in text
    assert "Random routing reached the final loss of Baseline in 0 of 3 seeds" in text
    assert "DTR reached the final loss of Baseline 1.4" in text
    assert said.warnings == []


def rivals(baseline, factors):
    """DTR runs whose losses are the baseline's times a factor each."""
    scaled_runs = [
        scaled(run, factor).assign_attrs(method="dtr", run_id=f"d{factor}")
        for run, factor in zip(baseline, factors, strict=True)
    ]
    return [changed(run, method="dtr") for run in scaled_runs]


def test_verdict_where_all_seeds_agree_but_are_too_few(runs):
    baseline = [run for run in runs if run.attrs["method"] == "baseline"][:2]
    said = verdict([*baseline, *rivals(baseline, (0.98, 0.9))])
    assert "DTR ends lower than Baseline in each of 2 seeds" in said.findings[0]
    assert "too few to exclude that they are level" in said.findings[0]


def test_verdict_of_a_draw_with_few_seeds(runs):
    baseline = [run for run in runs if run.attrs["method"] == "baseline"][:2]
    draw = rivals(baseline, (0.97, 1.02))
    said = verdict([*baseline, *draw])
    assert "DTR and Baseline end level as far as these seeds can tell" in said.findings[0]
    assert any("2 seeds" in warning for warning in said.warnings)
    one = verdict([baseline[0], draw[0]])
    assert "one pair is no evidence" in one.findings[0]
    assert any("One seed" in warning for warning in one.warnings)
    assert "nothing to compare" in verdict(baseline).findings[0]


def test_verdict_says_which_pairs_conflict_beyond_noise(runs):
    """Of 28 pairs 16 conflict (-0.4) and 12 agree (0.8)."""
    said = " ".join(verdict(runs).findings)
    pairs = re.findall(r"Of 28 pairs of intervals (\d+) conflict and (\d+) agree significantly .* (\d+) are not", said)
    assert len(re.findall("Conflict rate of", said)) == 3
    against, together, rest = map(int, pairs[0])
    assert against + together + rest == 28
    assert 10 <= against <= 17
    assert 10 <= together <= 13
    rows = runs_frame(runs).set_index("method").loc["dtr", "conflict_rate"]
    assert f"over probes; ± {rows.std(ddof=1) / np.sqrt(3):.3f} over 3 runs" in said


def test_verdict_on_one_run_says_that_it_is_one(runs):
    said = " ".join(verdict(runs[:1]).findings)
    assert "over the probes of one run, which says nothing about other seeds" in said


def test_mixed_arrivals_name_every_seed(runs):
    chosen = [run for run in runs if run.attrs["method"] != "random"]
    chosen = [scaled(run, 3.0) if run.attrs["name"] == "dtr-1" else run for run in chosen]
    text = summary_frame(chosen).loc["dtr", "steps_to_baseline"]
    assert text.split(", ")[1] == "not reached"
    assert "in 2 of 3 seeds" in " ".join(verdict(chosen).findings)


def test_a_diverged_run_poisons_the_mean_rather_than_vanish(runs):
    broken = [scaled(run, np.nan) if run.attrs["name"] == "dtr-1" else run for run in runs]
    summary = summary_frame(broken)
    assert np.isnan(summary.loc["dtr", "val_loss"])
    assert summary.loc["dtr", ["arrived", "paired"]].tolist() == [2, 3]
    assert np.isnan(summary.loc["dtr", "difference"])
    assert "diverged in 1 of 3 seeds" in " ".join(verdict(broken).findings)


def test_comparability_names_what_differs(runs):
    assert comparability(runs) == []
    other = changed(runs[0], batch_size=128, parameters=3)
    assert "batch_size, parameters" in comparability([*runs, other])[0]
    routing = {"alpha": 4.0, "beta": 0.5, "variant": "paper", "seed": 9, "per_block": False}
    dtr = next(run for run in runs if run.attrs["method"] == "dtr")
    assert "DTR differ in their routing" in comparability([*runs, changed(dtr, routing=routing)])[0]
    killed = runs[0].assign_attrs(status="KILLED")
    assert "baseline-0 (KILLED)" in comparability([killed])[0]
    partial = runs[0].assign(coverage=runs[0].coverage * 0.9)
    assert "baseline-0 90.0%" in comparability([partial, runs[1]])[0]
    short = runs[0].isel(val_step=slice(3))
    assert "different steps (300 to 1,000)" in comparability([short, runs[1]])[0]


def test_readable_hides_nothing(runs):
    table = readable(summary_frame(runs)).set_index("")
    assert list(table.columns) == ["Baseline", "Random routing", "DTR"]
    assert table.loc["Steps to Baseline's final loss", "Random routing"] == "not reached"
    assert table.loc["Final validation loss", "DTR"] == "0.1680\u00a0±\u00a00.0033"
    assert table.loc["  at high noise (last quarter)", "DTR"] == "0.06084\u00a0±\u00a00.00119"
    assert table.loc["Difference to Baseline [95 %]", "DTR"].startswith("-0.0")
    broken = [scaled(run, np.nan) if run.attrs["name"] == "dtr-1" else run for run in runs]
    assert readable(summary_frame(broken)).set_index("").loc["Final validation loss", "DTR"] == "diverged"
    one = readable(summary_frame(runs[:1])).set_index("")
    assert "±" not in one.loc["Final validation loss", "Baseline"]


def test_no_error_is_given_where_there_are_too_few_probes(runs):
    few = [run.isel(gradient_step=slice(3)) for run in runs]
    assert np.isnan(summary_frame(few).loc["dtr", "conflict_rate_error"])
    said = [sentence for sentence in verdict(few).findings if "Conflict rate" in sentence]
    assert len(said) == 3
    assert all("(too few probes for an error)" in sentence and "±" not in sentence for sentence in said)
    assert "±" not in readable(summary_frame(few)).set_index("").loc["Conflict rate (noise gives 0.5)", "DTR"]
    # Probes that all agree: an error of zero is none.
    one = runs[0].isel(gradient_step=[0] * 10).assign_coords(gradient_step=np.arange(10))
    assert "the same in every probe" in verdict([one]).findings[-1]
    # One run with too few probes leaves the method without an error, rather than that of the others.
    assert np.isnan(summary_frame([few[0], *runs[1:]]).loc["baseline", "conflict_rate_error"])


def test_comparability_within_one_method(runs):
    baseline = [run for run in runs if run.attrs["method"] == "baseline"]
    found = comparability([changed(baseline[0], parameters=3), *baseline[1:]])
    assert len(found) == 1
    assert found[0].startswith("Runs of Baseline differ in parameters, not only in their seed")
    smaller = baseline[0].isel(layer=[0, 1, 2, 4])
    assert "conflict by block is left out" in comparability([smaller, *baseline[1:]])[0]
    others = [run for run in runs if run.attrs["method"] == "dtr"]
    between = comparability([*(changed(run, batch_size=128) for run in baseline), *others])
    assert between == ["The runs differ in batch_size: a difference between methods may come from that."]


def test_verdict_warns_if_not_all_seeds_can_be_paired(runs):
    said = verdict([run for run in runs if run.attrs["name"] != "dtr-2"])
    assert said.warnings[0].startswith("Only 2 of 3 seeds can be paired")
    assert "2 seeds: an interval from so few" in said.warnings[0]
    assert "DTR ends lower than Baseline, by" in said.findings[0]
    assert "a hint from too few seeds to claim it" in said.findings[0]
    strangers = [run for run in runs if run.attrs["name"] in ("baseline-0", "dtr-1")]
    found = verdict(strangers)
    assert found.findings[0] == "DTR and Baseline have no finished run with the same seed, so they are not compared."
    assert "nothing can be paired" in found.warnings[0]


def test_verdict_says_if_the_order_is_another_at_equal_time(runs):
    def timed(run):
        seconds = run["val_step"].values * (3.0 if run.attrs["method"] == "dtr" else 1.0)
        return run.assign(training_seconds=("clock_step", seconds)).assign_coords(clock_step=run["val_step"].values)

    said = " ".join(verdict([timed(run) for run in runs]).findings)
    assert "DTR is lower than Baseline at equal steps" in said
    assert "but higher at equal training time" in said
    assert "Random routing is lower than Baseline" not in said


def many_seeds(runs, count, late):
    """A baseline and a DTR run of so many seeds each, of which the last DTR runs are too slow to arrive."""
    made = []
    for seed in range(count):
        for run in runs[0], next(run for run in runs if run.attrs["method"] == "dtr"):
            slow = run.attrs["method"] == "dtr" and seed >= count - late
            copy = changed(scaled(run, 3.0) if slow else run, seed=seed)
            made.append(copy.assign_attrs(seed=seed, run_id=f"{run.attrs['method']}{seed}"))
    return made


def test_of_many_seeds_the_median_is_shown_and_how_many_arrived(runs):
    text = summary_frame(many_seeds(runs, 10, late=3)).loc["dtr", "steps_to_baseline"]
    steps = float(text.split(" ")[0])
    np.testing.assert_allclose(steps, 1000 / synthetic.DTR_SPEED, rtol=0.06)
    assert text.endswith(" (7 of 10 runs)")
    assert summary_frame(many_seeds(runs, 10, late=6)).loc["dtr", "steps_to_baseline"] == "not reached (4 of 10 runs)"


def test_a_loss_weight_that_the_method_names_is_what_is_compared(runs):
    plain = [run for run in runs if run.attrs["method"] == "baseline"]
    named = [changed(run, method="baseline+min_snr", loss_weight="min_snr") for run in plain]
    assert comparability([*plain, *named]) == []
    unnamed = [changed(run, method="dtr", loss_weight="min_snr") for run in plain]
    assert comparability([*plain, *unnamed])[0].startswith("The runs differ in loss_weight")
