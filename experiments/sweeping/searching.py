"""The trainings of a search: optuna proposes settings when a worker is free, and hears what became of them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments.sweeping.cells import Cell, CheckedCell, Place, SweepRun, training
from experiments.sweeping.plan import Step, planned, refuse_other_settings
from experiments.sweeping.settings import Settings, flattened, merged, nested
from experiments.sweeping.spec import Sweep
from experiments.sweeping.store import FINISHED, KnownRun, known_runs, set_aside
from experiments.sweeping.study import SearchStudy, Trial
from experiments.trainings import Training
from lightning_modules.errors import UserInputError


def trial_settings(sweep: Sweep, trial: Trial) -> Settings:
    """All that a trial sets over the configuration files, the seed aside."""
    return merged(sweep.settings, trial.parameters, sweep.overrides)


def trial_cell(sweep: Sweep, base: CheckedCell, trial: Trial) -> CheckedCell:
    """A trial as a cell, with the configuration that follows from that of another trial."""
    cell = Cell(f"trial{trial.number}", {"trial": str(trial.number)}, trial_settings(sweep, trial))
    resolved = nested(merged(flattened(base.resolved), trial.parameters))
    return dataclasses.replace(base, cell=cell, resolved=resolved)


@dataclasses.dataclass
class _Open:
    """A trial whose seeds have not all been trained."""

    trial: Trial
    waiting: set[int]
    values: list[float] = dataclasses.field(default_factory=list)
    failed: bool = False


class Searching:
    """Makes the trainings of a search, interrupted ones first, and tells the study what came of them.

    Args:
        sweep: The search.
        place: Where its runs go.
        study: What was tried so far.
        base: A trial that the trainer accepts.
        known: The runs that are there.
        steps: Step of each checkpoint that can be gone on from.

    Attributes:
        interrupted: Trials that go on.
        untried: How many further ones there will be.
        expected: How many trainings these are.
    """

    def __init__(
        self,
        sweep: Sweep,
        place: Place,
        study: SearchStudy,
        base: CheckedCell,
        known: Sequence[KnownRun],
        steps: Mapping[Path, int],
    ) -> None:
        assert sweep.search is not None
        self.sweep = sweep
        self.metric = sweep.search.metric
        self.place = place
        self.study = study
        self.base = base
        self.known = known
        self.checkpoint_steps = steps
        self.interrupted = [(trial, self._planned(trial)) for trial in study.interrupted()]
        self.untried = max(0, sweep.search.trials - len(study.ended()) - len(self.interrupted))
        trained = sum(step.finished is None for _, steps in self.interrupted for step in steps)
        self.expected = trained + self.untried * len(sweep.seeds)
        self._open: dict[str, tuple[_Open, SweepRun]] = {}

    def trainings(self) -> Iterator[Training]:
        """One after the other; a trial is asked for when its first training can start."""
        for trial, steps in self.interrupted:
            yield from self._of(trial, steps)
        for _ in range(self.untried):
            trial = self.study.ask()
            yield from self._of(trial, self._planned(trial))

    def ended(self, training: Training, succeeded: bool) -> None:
        """Takes a training's result.

        Raises:
            UserInputError: If its run does not have the metric.
        """
        trial, run = self._open.pop(training.name)
        trial.waiting.discard(run.seed)
        if succeeded:
            self._take(trial, self._result(run))
        else:
            trial.failed = True
        self._settle(trial)

    def _planned(self, trial: Trial) -> list[Step]:
        checked = trial_cell(self.sweep, self.base, trial)
        refuse_other_settings(self.sweep, [checked], self.known, self.checkpoint_steps, self.place)
        runs = checked.runs(self.sweep.seeds)
        return [planned(run, self.known, self.checkpoint_steps, self.place) for run in runs]

    def _of(self, trial: Trial, steps: Sequence[Step]) -> Iterator[Training]:
        state = _Open(trial, {step.run.seed for step in steps if step.finished is None})
        for step in steps:
            if step.finished is not None:
                self._take(state, step.finished)
        for step in steps:
            if step.finished is not None:
                continue
            if state.failed:  # the mean is lost, whatever the other seeds give
                state.waiting.discard(step.run.seed)
                continue
            set_aside(step.superseded, self.place.uri)
            self._open[step.run.name] = (state, step.run)
            yield training(self.sweep, self.place, step.run, step.checkpoint)
        self._settle(state)

    def _take(self, trial: _Open, run: KnownRun) -> None:
        if self.metric not in run.metrics:
            raise UserInputError(
                f"{self.sweep.path}: search: run {run.name} has no metric {self.metric!r}; it has: "
                f"{', '.join(sorted(run.metrics)) or 'none'}"
            )
        value = run.metrics[self.metric]
        trial.values.append(value)
        # MLflow's databases keep the largest number in the place of an infinite one.
        trial.failed = trial.failed or not abs(value) < 1e300

    def _settle(self, trial: _Open) -> None:
        """Tells the study once, when no training of the trial is left."""
        if not trial.waiting:
            self.study.tell(trial.trial.number, None if trial.failed else statistics.fmean(trial.values))
            trial.waiting.add(-1)  # never told again

    def _result(self, run: SweepRun) -> KnownRun:
        for known in known_runs(self.sweep, self.place.uri):
            if known.identity == run.identity and known.status == FINISHED:
                return known
        raise UserInputError(
            f"run {run.name} has ended, but MLflow does not know: when the server is back, give the same command again"
        )
