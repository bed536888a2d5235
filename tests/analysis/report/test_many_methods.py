import json

import pytest

from analysis.frames import curves_frame, runs_frame
from analysis.report.figures import drawn_report
from analysis.report.many_methods import MOST_DRAWN, drawn_methods, verdict_of_many
from analysis.summary import readable, summary_frame, verdict

PARTS = ("", "+min_snr", "+p2", "+uw", "+pcgrad", "+nash_mtl", "+upgrad")


def as_method(run, method):
    manifest = json.dumps(json.loads(run.attrs["manifest"]) | {"method": method})
    return run.assign_attrs(method=method, manifest=manifest, run_id=f"{method}-{run.attrs['seed']}")


@pytest.fixture(scope="module")
def many(runs):
    """A grid of 3 x 7 methods, of which each trains as its routing does."""
    return [as_method(run, run.attrs["method"] + part) for part in PARTS for run in runs]


def test_all_are_drawn_while_they_are_few():
    few = [f"baseline{part}" for part in PARTS]
    assert drawn_methods(few) == few
    assert len(few) < MOST_DRAWN


def test_of_a_grid_the_routings_are_drawn_and_else_the_first_methods():
    grid = [f"{routing}{part}" for part in PARTS for routing in ("dtr", "random", "baseline")]
    assert drawn_methods(grid) == ["baseline", "random", "dtr"]
    line = ["baseline", *(f"dtr{part}" for part in PARTS[1:]), "baseline+dwa", "baseline+famo"]
    assert drawn_methods(line) == ["baseline", "baseline+dwa", "baseline+famo", *(f"dtr{part}" for part in PARTS[1:6])]


def test_the_verdict_speaks_of_the_methods_that_are_drawn_and_counts_all(many, runs):
    summary, curves = summary_frame(runs_frame(many), curves_frame(many)), curves_frame(many)
    said = verdict_of_many(many, summary, curves)
    assert said.findings[0].startswith(
        "Of 20 methods compared with Baseline in final validation loss, paired by seed, "
    )
    assert "7 end lower (DTR, DTR + Min-SNR, " in said.findings[0]
    assert "7 end higher (Random routing, Random routing + Min-SNR" in said.findings[0]
    assert "; 6 are not resolved" in said.findings[0]  # the baseline's own doubles
    few = verdict(runs, summary_frame(runs_frame(runs), curves_frame(runs)), curves_frame(runs))
    assert said.findings[1:] == few.findings
    assert "about Baseline, Random routing, DTR." in said.warnings[-1]


def test_the_verdict_of_few_methods_is_the_usual_one(runs):
    summary, curves = summary_frame(runs_frame(runs), curves_frame(runs)), curves_frame(runs)
    assert verdict_of_many(runs, summary, curves) == verdict(runs, summary, curves)


def test_a_report_of_many_methods_has_the_figures_of_few(many, runs):
    bare = [run[["val_loss", "val_quarter_loss", "quarter_timesteps"]].assign_attrs(run.attrs) for run in many]
    summary, curves = summary_frame(runs_frame(bare), curves_frame(bare)), curves_frame(bare)
    _, sections = drawn_report(bare, summary, curves)
    few = [run for run in bare if "+" not in run.attrs["method"]]
    _, expected = drawn_report(few, summary_frame(runs_frame(few), curves_frame(few)), curves_frame(few))
    for ours, theirs in zip(sections, expected, strict=True):
        assert [figure.png for figure in ours.figures] == [figure.png for figure in theirs.figures]


def test_a_table_of_many_methods_has_a_row_for_each(many):
    table = readable(summary_frame(runs_frame(many), curves_frame(many)))
    assert table[""].tolist()[:2] == ["Baseline", "Baseline + Min-SNR"]
    assert len(table) == 21
    assert list(table.columns)[:4] == ["", "Seeds", "Final validation loss", "at low noise (first quarter)"]
