"""Tests for `experiments/sweeping/searching.py`: which trainings a search makes, and what the study hears of them."""

from __future__ import annotations

import statistics

import pytest
from optuna.trial import TrialState

from experiments.sweeping import searching
from experiments.sweeping.cells import Cell, CheckedCell, Place
from experiments.sweeping.searching import Searching, trial_cell
from experiments.sweeping.spec import read_sweep
from experiments.sweeping.store import KnownRun
from experiments.sweeping.study import SearchStudy
from lightning_modules.errors import UserInputError
from tests.experiments.sweeping.helpers import SEARCH, changed, written

RATE = "model.init_args.optimization.learning_rate"


class World:
    """A search whose runs are made up: ``results`` holds a value, None for a failure, by the name of a training."""

    def __init__(self, tmp_path, monkeypatch, *, seeds, trials=2):
        self.sweep = read_sweep(
            written(changed(SEARCH, seeds=seeds, search={**SEARCH["search"], "trials": trials}), tmp_path / "s.yaml")
        )
        self.place = Place(f"sqlite:///{tmp_path / 'm.db'}", tmp_path / "runs", parent="p")
        self.path = tmp_path / "study.db"
        self.base = CheckedCell(Cell("a trial", {}, {}), {"trainer": {"max_steps": 4}}, (), 4)
        self.known: list[KnownRun] = []
        self.told: list[str] = []
        monkeypatch.setattr(searching, "known_runs", lambda sweep, uri: self.known)

    def start(self) -> Searching:
        self.study = SearchStudy(self.path, "s", self.sweep.search, {"a": 1})
        return Searching(self.sweep, self.place, self.study, self.base, self.known, {})

    def end(self, search: Searching, job, value: float | None, metric: str = "loss/val") -> None:
        self.told.append(job.name)
        if value is not None:
            _, run = search._open[job.name]
            self.known.append(
                KnownRun(job.name, job.name, "FINISHED", run.checked.cell.tag, run.seed, run.identity, {metric: value})
            )
        search.ended(job, value is not None)

    def states(self) -> list[tuple[TrialState, float | None]]:
        return [(trial.state, trial.value) for trial in self.study.ended()]


@pytest.fixture
def world(tmp_path, monkeypatch):
    return lambda **options: World(tmp_path, monkeypatch, **options)


def test_the_mean_over_seeds_is_a_trial_s_value(world):
    here = world(seeds=[3, 5])
    search = here.start()
    assert search.expected == 4
    for value, job in zip((1.0, 2.0, 3.0, 5.0), search.trainings(), strict=True):
        here.end(search, job, value)
    assert here.told == ["trial0-seed3", "trial0-seed5", "trial1-seed3", "trial1-seed5"]
    assert here.states() == [(TrialState.COMPLETE, 1.5), (TrialState.COMPLETE, 4.0)]


def test_seeds_may_end_in_any_order_and_after_the_next_trial_began(world):
    here = world(seeds=[0, 1])
    search = here.start()
    jobs = search.trainings()
    running = [next(jobs) for _ in range(3)]
    assert [job.name for job in running] == ["trial0-seed0", "trial0-seed1", "trial1-seed0"]
    here.end(search, running[2], 9.0)
    here.end(search, running[1], 2.0)
    assert here.states() == []
    here.end(search, running[0], 1.0)
    assert here.states() == [(TrialState.COMPLETE, 1.5)]
    here.end(search, next(jobs), 7.0)
    assert list(jobs) == []
    assert here.states()[1] == (TrialState.COMPLETE, 8.0)


@pytest.mark.parametrize("value", [None, float("nan"), 1.7976931348623157e308])
def test_a_failed_seed_fails_its_trial_and_spares_the_others(world, value):
    here = world(seeds=[0, 1, 2])
    search = here.start()
    for job in search.trainings():
        here.end(search, job, value if job.name.startswith("trial0") else 2.0)
    assert here.told == ["trial0-seed0", "trial1-seed0", "trial1-seed1", "trial1-seed2"]
    assert here.states() == [(TrialState.FAIL, None), (TrialState.COMPLETE, 2.0)]


def test_an_interrupted_trial_goes_on_without_its_finished_seeds(world):
    here = world(seeds=[0, 1])
    search = here.start()
    jobs = search.trainings()
    here.end(search, next(jobs), 1.0)
    next(jobs)  # and then the power fails
    again = here.start()
    assert (len(again.interrupted), again.untried, again.expected) == (1, 1, 3)
    here.told.clear()
    for job in again.trainings():
        here.end(again, job, 3.0)
    assert here.told == ["trial0-seed1", "trial1-seed0", "trial1-seed1"]
    assert here.states() == [(TrialState.COMPLETE, 2.0), (TrialState.COMPLETE, 3.0)]
    once_more = here.start()
    assert list(once_more.trainings()) == []


def test_a_trial_whose_runs_finished_unheard_is_told_without_a_training(world):
    here = world(seeds=[0], trials=1)
    search = here.start()
    (job,) = [next(search.trainings())]
    _, run = search._open[job.name]
    here.known.append(KnownRun("r", job.name, "FINISHED", "trial=0", 0, run.identity, {"loss/val": 0.5}))
    again = here.start()
    assert again.expected == 0
    assert list(again.trainings()) == []
    assert here.states() == [(TrialState.COMPLETE, 0.5)]


def test_a_metric_that_no_run_has_ends_the_search(world):
    here = world(seeds=[0])
    search = here.start()
    job = next(search.trainings())
    with pytest.raises(UserInputError, match=r"run trial0-seed0 has no metric 'loss/val'; it has: loss/test"):
        here.end(search, job, 1.0, metric="loss/test")


def test_a_run_that_mlflow_does_not_know_yet_ends_the_search(world):
    here = world(seeds=[0])
    search = here.start()
    job = next(search.trainings())
    with pytest.raises(UserInputError, match="MLflow does not know: when the server is back, give the same command"):
        search.ended(job, True)


def test_a_trial_has_its_parameters_and_the_sweep_s_settings(world):
    here = world(seeds=[0], trials=1)
    search = here.start()
    list(search.trainings())
    (trial,) = here.study.interrupted()
    checked = trial_cell(here.sweep, here.base, trial)
    assert checked.cell.name == "trial0"
    assert checked.cell.settings["trainer.max_steps"] == 4
    assert checked.cell.settings[RATE] == trial.parameters[RATE]
    assert checked.resolved["model"]["init_args"]["optimization"]["learning_rate"] == trial.parameters[RATE]
    assert checked.resolved["trainer"] == {"max_steps": 4}
    assert statistics.fmean([checked.max_steps]) == 4
