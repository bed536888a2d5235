"""Tests for `experiments/sweeping/study.py`: optuna's record of a search, left and taken up again."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from optuna.trial import TrialState

from experiments.sweeping.parameters import Parameter, Search
from experiments.sweeping.study import SearchStudy
from lightning_modules.errors import UserInputError

PARAMETERS = {
    "rate": Parameter(1e-4, 1e-2, log=True),
    "depth": Parameter(2, 6, step=2, whole=True),
    "share": Parameter(0.5, 1.0, step=0.25),
    "name": Parameter(choices=("uniform", "p2", None, False)),
}


def search(**changes) -> Search:
    return Search(
        **{"metric": "m", "direction": "minimize", "trials": 4, "sampler": "tpe", "seed": 0, "parameters": PARAMETERS}
        | changes
    )


@pytest.fixture
def open_study(tmp_path: Path):
    def opened(name: str = "a", described=None, **changes) -> SearchStudy:
        return SearchStudy(tmp_path / f"{name}.db", name, search(**changes), described or {"metric": "m"})

    return opened


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_values_lie_where_they_are_searched(open_study, sampler):
    study = open_study(sampler=sampler)
    for _ in range(12):
        trial = study.ask()
        assert 1e-4 <= trial.parameters["rate"] <= 1e-2
        assert trial.parameters["depth"] in (2, 4, 6)
        assert isinstance(trial.parameters["depth"], int)
        assert trial.parameters["share"] in (0.5, 0.75, 1.0)
        assert trial.parameters["name"] in ("uniform", "p2", None, False)
        study.tell(trial.number, trial.parameters["rate"])
    rates = [trial.params["rate"] for trial in study.ended()]
    assert len(set(rates)) == 12
    assert study.best()[1] == min(rates)


def test_tpe_learns_from_what_it_is_told(open_study):
    parameters = {"x": Parameter(-10.0, 10.0)}
    study = open_study(parameters=parameters)
    for _ in range(30):
        trial = study.ask()
        study.tell(trial.number, (trial.parameters["x"] - 3.0) ** 2)
    tried = [trial.params["x"] for trial in study.ended()]
    late = [abs(x - 3.0) for x in tried[15:]]
    assert statistics.median(late) < 3.5, "of uniform draws half are within 5"


def test_an_interruption_changes_nothing_in_a_random_search(open_study):
    whole = open_study("whole", sampler="random")
    expected = [whole.ask().parameters for _ in range(4)]
    first = open_study("cut", sampler="random")
    drawn = [first.ask().parameters for _ in range(2)]
    again = open_study("cut", sampler="random")
    drawn += [again.ask().parameters for _ in range(2)]
    assert drawn == expected


def test_ended_trials_are_kept_and_interrupted_ones_found(open_study):
    study = open_study()
    trials = [study.ask() for _ in range(3)]
    study.tell(0, 2.0)
    study.tell(1, None)
    again = open_study(trials=9)
    assert [trial.state for trial in again.ended()] == [TrialState.COMPLETE, TrialState.FAIL]
    assert again.interrupted() == [trials[2]]
    again.tell(2, 1.0)
    assert again.interrupted() == []
    assert again.best() == (trials[2], 1.0)


def test_a_trial_cut_short_while_it_was_drawn_counts_for_nothing(open_study):
    study = open_study()
    study.study.ask()
    again = open_study()
    assert again.interrupted() == []
    again.drop_undrawn()
    assert again.ended() == []
    assert again.ask().number == 1


def test_the_best_depends_on_the_direction(open_study):
    study = open_study(direction="maximize")
    assert study.best() is None
    for value in (1.0, 3.0, None, 2.0):
        study.tell(study.ask().number, value)
    assert study.best()[1] == 3.0
    assert not math.isnan(study.best()[1])


def test_another_search_of_the_same_name_is_refused(open_study, tmp_path):
    open_study(described={"metric": "m", "parameters": {"rate": {"low": 1}}})
    open_study(described={"metric": "m", "parameters": {"rate": {"low": 1}}})
    with pytest.raises(UserInputError, match=r"another search of this name: parameters\.rate\.low was 1, is 2"):
        open_study(described={"metric": "m", "parameters": {"rate": {"low": 2}}})
    (tmp_path / "no.db").write_text("this is no database, but long enough to be looked at " * 20)
    with pytest.raises(UserInputError, match=r"no\.db cannot be used as the record of the search"):
        open_study("no")
