"""Cells of a grid (or trials of a search), their runs, and the `dtr-lab train` that makes each of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.sweeping.settings import Settings, digest, flattened, merged, nested
from experiments.sweeping.spec import Sweep
from experiments.trainings import Training
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records

_NOT_COMPARED = ("config", "resume", "tracking", "progress", "checkpoint", "seed_everything")
"""Parts of a configuration that do not change what is trained, or follow from the seed."""
_SEEDS = ("model.init_args.seed", "data.init_args.seed")


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is trained with one seed or several.

    Attributes:
        name: As in the names of its runs.
        choices: Axis -> choice.
        settings: All that is set over the configuration files, the seed aside.
    """

    name: str
    choices: dict[str, str]
    settings: Settings

    @property
    def tag(self) -> str:
        """The value of the runs' tag `records.TAG_CELL`."""
        return records.cell_tag(self.choices)


def grid_cells(sweep: Sweep) -> list[Cell]:
    """All cells of a grid, the last axis fastest.

    Raises:
        UserInputError: If two cells would have one name.
    """
    cells: dict[str, Cell] = {}
    for names in itertools.product(*sweep.axes.values()):
        choices = dict(zip(sweep.axes, names, strict=True))
        own = [sweep.axes[axis][choice] for axis, choice in choices.items()]
        name = "-".join(names)
        if name in cells:
            raise UserInputError(f"{sweep.path}: two cells are called {name}: rename a choice of one of the axes")
        cells[name] = Cell(name, choices, merged(sweep.settings, *own, sweep.overrides))
    return list(cells.values())


@dataclasses.dataclass(frozen=True)
class CheckedCell:
    """A cell whose configuration the trainer accepts.

    Attributes:
        cell: The cell.
        resolved: Nested, all settings of its runs that decide what is trained, defaults included, the seed's aside.
        seeded: The settings of it that take the run's seed.
        max_steps: Steps of a run.
    """

    cell: Cell
    resolved: dict[str, Any]
    seeded: tuple[str, ...]
    max_steps: int

    @classmethod
    def of(cls, cell: Cell, configuration: Mapping[str, Any], seeded: Sequence[str]) -> CheckedCell:
        """From the whole configuration that the trainer's parser made of the cell's settings."""
        flat = flattened(configuration)
        own = tuple(key for key in seeded if key in flat)
        return cls(cell, comparable(configuration, own), own, int(flat["trainer.max_steps"]))

    def runs(self, seeds: Sequence[int]) -> list[SweepRun]:
        """Its run for each seed."""
        return [SweepRun(self, seed) for seed in seeds]


def comparable(configuration: Mapping[str, Any], seeded: Sequence[str]) -> dict[str, Any]:
    """The part of a configuration that must be the same in all runs of a cell."""
    flat = flattened({key: value for key, value in configuration.items() if key not in _NOT_COMPARED})
    return nested({key: value for key, value in flat.items() if key not in (*_SEEDS, *seeded)})


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One training of a sweep.

    Attributes:
        checked: Its cell.
        seed: Its seed.
    """

    checked: CheckedCell
    seed: int

    @property
    def name(self) -> str:
        """As MLflow shows it."""
        return f"{self.checked.cell.name}-seed{self.seed}"

    @property
    def identity(self) -> str:
        """Equal for equal trainings: the value of the tag `records.TAG_SETTINGS`."""
        return digest({"settings": self.checked.resolved, "seeded": self.checked.seeded, "seed": self.seed})

    @property
    def settings(self) -> Settings:
        """All that is set over the configuration files, the seed included."""
        return merged(
            self.checked.cell.settings,
            {"seed_everything": self.seed, **dict.fromkeys(self.checked.seeded, self.seed)},
        )


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the runs of a sweep go.

    Attributes:
        uri: MLflow store.
        run_dir: Folder of checkpoints.
        parent: The run that stands for the sweep; None while nothing is trained.
    """

    uri: str
    run_dir: Path
    parent: str | None = None

    def folder(self, sweep: Sweep) -> Path:
        """What belongs to the sweep as a whole."""
        return self.run_dir / "sweeps" / sweep.name

    def checkpoint(self, run_id: str) -> Path:
        """Where a run keeps its last checkpoint."""
        return self.run_dir / run_id / "checkpoints" / "last.ckpt"


def overlay(settings: Settings, path: Path) -> Path:
    """Writes settings as a further configuration file.

    A file, since the trainer's parser is strict about the keys in one: on its command line it would complete
    ``loss_weight.nam``, and refuse ``null``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(nested(settings), sort_keys=False), encoding="utf-8")
    return path


def arguments(sweep: Sweep, place: Place, settings: Path, name: str, tags: Mapping[str, str]) -> list[str]:
    """Command line of one training, after ``dtr-lab train``."""
    tracking = {
        "tracking_uri": place.uri,
        "experiment": sweep.experiment,
        "run_name": name,
        "comparison": sweep.name,
        "parent_run_id": place.parent,
        "run_dir": place.run_dir,
        "tags": json.dumps(tags),
    }
    return [
        *(f"--config={path}" for path in (*sweep.configs, settings)),
        "--progress.style=lines",
        *(f"--tracking.{key}={value}" for key, value in tracking.items() if value is not None),
    ]


def training(sweep: Sweep, place: Place, run: SweepRun, checkpoint: Path | None = None) -> Training:
    """The training that makes a run, or goes on with it from its checkpoint."""
    folder = place.folder(sweep)
    tags = {
        records.TAG_CELL: run.checked.cell.tag,
        records.TAG_SETTINGS: run.identity,
        records.TAG_SEED: str(run.seed),
    }
    written = overlay(run.settings, folder / "configs" / f"{run.name}.yaml")
    resume = [] if checkpoint is None else [f"--resume={checkpoint}"]
    return Training(
        name=run.name,
        arguments=[*arguments(sweep, place, written, run.name, tags), *resume],
        log=folder / "logs" / f"{run.name}.log",
    )
