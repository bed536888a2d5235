"""Tests for `experiments/sweeping/plan.py`: what is done for a run, given the runs that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.sweeping import plan
from experiments.sweeping.cells import Cell, CheckedCell, Place, SweepRun
from experiments.sweeping.plan import checkpoints_of, planned, refuse_other_settings
from experiments.sweeping.spec import read_sweep
from experiments.sweeping.store import KnownRun
from lightning_modules.errors import UserInputError
from tests.experiments.sweeping.helpers import GRID, written

CHECKED = CheckedCell(Cell("c", {"a": "c"}, {}), {"trainer": {"max_steps": 100}}, (), 100)
RUN = SweepRun(CHECKED, 1)
PLACE = Place("sqlite:///m.db", Path("runs"))


def known(run_id: str, status: str, *, seed: int = 1, cell: str = "a=c", identity: str | None = None) -> KnownRun:
    own = SweepRun(CHECKED, seed).identity if identity is None else identity
    return KnownRun(run_id, f"c-seed{seed}", status, cell, seed, own, {})


def steps(**at: int) -> dict[Path, int]:
    return {PLACE.checkpoint(run_id): step for run_id, step in at.items()}


def test_a_finished_run_is_left_alone():
    there = [known("f", "FINISHED"), known("other", "FINISHED", seed=2), known("d", "FAILED")]
    step = planned(RUN, there, steps(d=50), PLACE)
    assert (step.finished, step.checkpoint, step.said) == (there[0], None, "finished (f)")
    assert step.superseded == (there[2],)


def test_an_unfinished_run_goes_on_from_the_latest_checkpoint():
    there = [known("a", "KILLED"), known("b", "FAILED"), known("c", "RUNNING"), known("x", "KILLED", cell="a=d")]
    step = planned(RUN, there, steps(a=10, b=60, x=90), PLACE)
    assert (step.finished, step.checkpoint, step.at_step) == (None, PLACE.checkpoint("b"), 60)
    assert step.superseded == (there[0], there[2])
    assert step.said == "goes on at step 60 of 100"


@pytest.mark.parametrize(
    ("there", "at"),
    [
        (known("a", "KILLED"), {}),
        (known("a", "KILLED"), {"a": 100}),  # its last validation may be missing
        (known("a", "KILLED", identity="other"), {}),
    ],
)
def test_what_cannot_go_on_starts_anew(there, at):
    step = planned(RUN, [there], steps(**at), PLACE)
    assert (step.finished, step.checkpoint, step.superseded) == (None, None, (there,))
    assert step.said == "to train again (was KILLED)"


def test_nothing_there_is_to_train():
    assert planned(RUN, [], {}, PLACE).said == "to train"


def test_a_run_finished_twice_is_refused():
    with pytest.raises(UserInputError, match=r"c-seed1 is finished 2 times \(f, g\): delete all but one"):
        planned(RUN, [known("f", "FINISHED"), known("g", "FINISHED")], {}, PLACE)


def test_other_settings_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = read_sweep(written(GRID))
    before = {"trainer": {"max_steps": 50}, "tracking": {"experiment": "e"}, "seed_everything": 2}
    monkeypatch.setattr(plan, "configuration_of", lambda run, uri: before)
    other = known("f", "FINISHED", seed=2, identity="other")
    with pytest.raises(UserInputError, match=r"c has other settings than its run c-seed2 \(f\)") as caught:
        refuse_other_settings(sweep, [CHECKED], [known("g", "FINISHED"), other], {}, PLACE)
    assert ": trainer.max_steps was 50, is 100. Choose another `name`" in str(caught.value)
    monkeypatch.setattr(plan, "configuration_of", lambda run, uri: {})
    with pytest.raises(UserInputError, match="which of them is not known any more"):
        refuse_other_settings(sweep, [CHECKED], [other], {}, PLACE)


def test_settings_of_runs_that_count_for_nothing_may_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = read_sweep(written(GRID))
    unfinished = known("k", "KILLED", identity="other")
    elsewhere = known("f", "FINISHED", cell="a=d", identity="other")
    refuse_other_settings(sweep, [CHECKED], [unfinished, elsewhere], {}, PLACE)
    monkeypatch.setattr(plan, "configuration_of", lambda run, uri: {})
    with pytest.raises(UserInputError, match="c has other settings"):
        refuse_other_settings(sweep, [CHECKED], [unfinished], steps(k=10), PLACE)


def test_checkpoints_of_unfinished_runs_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("f", "k"):
        PLACE.checkpoint(name).parent.mkdir(parents=True)
        PLACE.checkpoint(name).touch()
    runs = [known("f", "FINISHED"), known("k", "KILLED"), known("none", "FAILED")]
    assert checkpoints_of(runs, PLACE) == [PLACE.checkpoint("k")]
