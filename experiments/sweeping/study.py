"""Optuna's part in a search: which settings to try next, and what became of those tried, kept in an SQLite file."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from experiments.sweeping.parameters import Parameter, Search
from experiments.sweeping.settings import differences
from lightning_modules.errors import UserInputError

_DESCRIPTION = "dtr.search"


@dataclasses.dataclass(frozen=True)
class Trial:
    """Settings that are tried.

    Attributes:
        number: Of the trial, from 0.
        parameters: Setting -> value.
    """

    number: int
    parameters: dict[str, Any]


class SearchStudy:
    """An optuna study that can be left and taken up again at any moment.

    Args:
        path: The SQLite file; created if need be.
        name: Of the study.
        search: What is searched.
        described: Everything that decides what the trials are, to find out whether it is the same search.

    Raises:
        UserInputError: If the file holds another search, or is no study.
    """

    def __init__(self, path: Path, name: str, search: Search, described: Mapping[str, Any]) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.search = search
        self.distributions = {key: _distribution(parameter) for key, parameter in search.parameters.items()}
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
            self.study = optuna.create_study(
                storage=storage, study_name=name, direction=search.direction, load_if_exists=True
            )
        except Exception as error:  # SQLAlchemy's, alembic's and optuna's own have no common base
            raise UserInputError(
                f"{path} cannot be used as the record of the search: {str(error).splitlines()[0]}"
            ) from error
        now = json.loads(json.dumps(described, default=str))
        before = self.study.user_attrs.get(_DESCRIPTION)
        if before is None:
            self.study.set_user_attr(_DESCRIPTION, now)
        elif before != now:
            raise UserInputError(
                f"{path} belongs to another search of this name: {differences(before, now)}. Choose another `name` for "
                "the sweep, or undo the change (`trials` may change)"
            )

    def interrupted(self) -> list[Trial]:
        """The trials that were asked for and never told of."""
        return [_plain(trial) for trial in self._drawn(TrialState.RUNNING)]

    def ended(self) -> list[FrozenTrial]:
        """The trials that succeeded or failed, in their order."""
        return self._drawn(TrialState.COMPLETE, TrialState.FAIL)

    def drop_undrawn(self) -> None:
        """Ends trials that an earlier process was killed in the midst of drawing; they count for nothing."""
        drawn = {trial.number for trial in self.interrupted()}
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            if trial.number not in drawn:
                self.study.tell(trial.number, state=TrialState.FAIL)

    def ask(self) -> Trial:
        """The next settings to try. Each trial has a random stream of its own, whenever the search was interrupted."""
        seed = int(np.random.SeedSequence([self.search.seed, len(self.study.trials)]).generate_state(1)[0])
        if self.search.sampler == "random":
            self.study.sampler = optuna.samplers.RandomSampler(seed=seed)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                # Those that still run count as bad, so that two workers do not try the same place.
                self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        trial = self.study.ask(self.distributions)
        return Trial(trial.number, dict(trial.params))

    def tell(self, number: int, value: float | None) -> None:
        """What became of a trial; None if it failed."""
        if value is None:
            self.study.tell(number, state=TrialState.FAIL)
        else:
            self.study.tell(number, value)

    def _drawn(self, *states: TrialState) -> list[FrozenTrial]:
        trials = self.study.get_trials(states=states)
        return [trial for trial in trials if trial.params.keys() == self.distributions.keys()]

    def best(self) -> tuple[Trial, float] | None:
        """The best trial and its value; None if none has succeeded."""
        complete = self.study.get_trials(states=[TrialState.COMPLETE])
        if not complete:
            return None
        sign = 1 if self.search.direction == "minimize" else -1
        best = min(complete, key=lambda trial: sign * _value(trial))
        return _plain(best), _value(best)


def _plain(trial: FrozenTrial) -> Trial:
    return Trial(trial.number, dict(trial.params))


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.choices:
        return CategoricalDistribution(parameter.choices)
    if parameter.whole:
        step = 1 if parameter.step is None else int(parameter.step)
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log, step=step)
    return FloatDistribution(float(parameter.low), float(parameter.high), log=parameter.log, step=parameter.step)
