"""Tests for `experiments/sweeping/cells.py`: cells, the identity of their runs, and the command that trains one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from experiments.sweeping.cells import Cell, CheckedCell, Place, SweepRun, comparable, grid_cells, training
from experiments.sweeping.spec import read_sweep
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from tests.experiments.sweeping.helpers import CONFIGS, GRID, changed, written

SEED_KEY = "model.init_args.routing.seed"


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def configuration(**changes) -> dict:
    """As the trainer's parser would make it, in short."""
    model = {"init_args": {"seed": 0, "routing": {"seed": 0, "beta": 0.5}}} | changes
    return {
        "seed_everything": 0,
        "trainer": {"max_steps": 4},
        "data": {"init_args": {"seed": 0}},
        "model": model,
        "tracking": {"experiment": "digits"},
        "progress": {"style": "lines"},
    }


def checked(cell: Cell, **changes) -> CheckedCell:
    return CheckedCell.of(cell, configuration(**changes), [SEED_KEY, "not.here"])


def test_axes_are_crossed_in_their_order():
    cells = grid_cells(read_sweep(written(GRID), overrides=["trainer.max_steps=9"]))
    assert [cell.name for cell in cells] == ["plain-uniform", "plain-p2", "random-uniform", "random-p2"]
    assert cells[3].tag == "routing=random,weight=p2"
    assert records.cell_choices(cells[3].tag) == {"routing": "random", "weight": "p2"}
    assert cells[3].settings["model.init_args.routing.kind"] == "random"
    assert cells[3].settings["model.init_args.loss_weight.name"] == "p2"
    assert {cell.settings["trainer.max_steps"] for cell in cells} == {9}


def test_two_cells_of_one_name_are_refused():
    axes = {"a": {"x-y": {}, "x": {}}, "b": {"z": {}, "y-z": {}}}
    with pytest.raises(UserInputError, match="two cells are called x-y-z: rename a choice"):
        grid_cells(read_sweep(written(changed(GRID, axes=axes))))


def test_the_identity_of_a_run_is_that_of_its_settings_and_seed():
    cell = Cell("c", {"a": "c"}, {})
    run = SweepRun(checked(cell), 0)
    assert run.checked.seeded == (SEED_KEY,)
    assert run.checked.max_steps == 4
    assert run.checked.resolved == {
        "trainer": {"max_steps": 4},
        "model": {"init_args": {"routing": {"beta": 0.5}}},
    }
    other_seed = configuration() | {
        "seed_everything": 5,
        "data": {"init_args": {"seed": 5}},
        "tracking": {"run_dir": 1},
    }
    assert comparable(other_seed, run.checked.seeded) == run.checked.resolved
    assert run.identity == SweepRun(checked(Cell("other", {}, {})), 0).identity, "names do not matter"
    different = checked(cell, init_args={"seed": 0, "routing": {"seed": 0, "beta": 0.6}})
    assert len({run.identity, SweepRun(run.checked, 1).identity, SweepRun(different, 0).identity}) == 3


def test_a_training_is_one_command_with_an_overlay():
    sweep = read_sweep(written(GRID))
    cell = grid_cells(sweep)[2]
    run = SweepRun(checked(cell), 7)
    job = training(sweep, Place("sqlite:///m.db", Path("runs"), parent="abc"), run, Path("runs/x/last.ckpt"))
    assert job.name == "random-uniform-seed7"
    assert job.log == Path("runs/sweeps/tiny/logs/random-uniform-seed7.log")
    overlay = Path("runs/sweeps/tiny/configs/random-uniform-seed7.yaml")
    assert job.arguments[:3] == [
        f"--config={CONFIGS / 'baseline.yaml'}",
        f"--config={overlay}",
        "--progress.style=lines",
    ]
    assert "--resume=runs/x/last.ckpt" in job.arguments
    assert {
        "--tracking.comparison=tiny",
        "--tracking.parent_run_id=abc",
        "--tracking.run_name=random-uniform-seed7",
    } < {*job.arguments}
    (tags,) = (text.partition("=")[2] for text in job.arguments if text.startswith("--tracking.tags="))
    assert json.loads(tags) == {
        records.TAG_CELL: "routing=random,weight=uniform",
        records.TAG_SETTINGS: run.identity,
        records.TAG_SEED: "7",
    }
    content = yaml.safe_load(overlay.read_text())
    assert content["seed_everything"] == 7
    assert content["model"]["init_args"]["routing"] == {"kind": "random", "beta": 0.5, "seed": 7}
    plain = dataclasses.replace(run, checked=checked(grid_cells(sweep)[0], init_args={"seed": 0}))
    assert "routing" not in str(plain.settings), "only runs that have the setting take the seed"
