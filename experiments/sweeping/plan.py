"""What is left to do of a sweep: which runs are finished, which go on, which start anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.sweeping.cells import CheckedCell, Place, SweepRun, comparable
from experiments.sweeping.settings import differences
from experiments.sweeping.spec import Sweep
from experiments.sweeping.store import FINISHED, KnownRun, configuration_of
from lightning_modules.errors import UserInputError


@dataclasses.dataclass(frozen=True)
class Step:
    """One run, and what is to be done for it.

    Attributes:
        run: The run.
        finished: The run that is there already; None if it must be trained.
        checkpoint: The checkpoint it goes on from; None if it starts anew.
        at_step: Of that checkpoint.
        superseded: Unfinished runs that are not gone on with.
    """

    run: SweepRun
    finished: KnownRun | None = None
    checkpoint: Path | None = None
    at_step: int = 0
    superseded: tuple[KnownRun, ...] = ()

    @property
    def said(self) -> str:
        """In words, for the plan."""
        if self.finished is not None:
            return f"finished ({self.finished.run_id[:8]})"
        if self.checkpoint is not None:
            return f"goes on at step {self.at_step} of {self.run.checked.max_steps}"
        before = ", ".join(run.status for run in self.superseded)
        return f"to train again (was {before})" if before else "to train"


def checkpoints_of(runs: Sequence[KnownRun], place: Place) -> list[Path]:
    """The last checkpoints of the unfinished runs that have one."""
    paths = [place.checkpoint(run.run_id) for run in runs if run.status != FINISHED]
    return [path for path in paths if path.is_file()]


def planned(run: SweepRun, known: Sequence[KnownRun], steps: Mapping[Path, int], place: Place) -> Step:
    """What is to be done for a run.

    Args:
        run: The run.
        known: The runs of the sweep; `refuse_other_settings` has accepted them.
        steps: Step of each checkpoint that can be gone on from.
        place: Where the runs are.

    Raises:
        UserInputError: If it is there twice.
    """
    mine = [each for each in known if each.cell == run.checked.cell.tag and each.seed == run.seed]
    same = [each for each in mine if each.identity == run.identity]
    finished = [each for each in same if each.status == FINISHED]
    if len(finished) > 1:
        ids = ", ".join(each.run_id for each in finished)
        raise UserInputError(f"{run.name} is finished {len(finished)} times ({ids}): delete all but one in MLflow")
    if finished:
        return Step(run, finished[0], superseded=tuple(each for each in mine if each is not finished[0]))
    # A checkpoint of the last step may have come before the last validation: such a run cannot be completed.
    on = [
        (step, each)
        for each in same
        if 0 < (step := steps.get(place.checkpoint(each.run_id), 0)) < run.checked.max_steps
    ]
    if not on:
        return Step(run, superseded=tuple(mine))
    at_step, best = max(on, key=lambda pair: pair[0])
    others = tuple(each for each in mine if each is not best)
    return Step(run, None, place.checkpoint(best.run_id), at_step, others)


def refuse_other_settings(
    sweep: Sweep, cells: Sequence[CheckedCell], known: Sequence[KnownRun], steps: Mapping[Path, int], place: Place
) -> None:
    """Refuses to mix runs of different settings under one name.

    Unfinished runs without a checkpoint do not count: nothing is lost with them.

    Raises:
        UserInputError: Naming the cell, the earlier run and what differs.
    """
    by_tag = {checked.cell.tag: checked for checked in cells}
    for each in known:
        checked = by_tag.get(each.cell)
        counts = each.status == FINISHED or place.checkpoint(each.run_id) in steps
        if checked is None or not counts or each.identity == SweepRun(checked, each.seed).identity:
            continue
        before = configuration_of(each, place.uri)
        differs = differences(comparable(before, checked.seeded), checked.resolved) if before else ""
        raise UserInputError(
            f"{sweep.path}: {checked.cell.name} has other settings than its run {each.name} ({each.run_id}): "
            f"{differs or 'which of them is not known any more'}. Choose another `name` for the sweep, undo the "
            "change, or delete that cell's runs in MLflow"
        )
