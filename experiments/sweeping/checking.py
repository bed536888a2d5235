"""Lets the trainer's own parser read every cell's configuration, before the first training starts.

In one process of its own: it imports torch, builds every model once, and is gone before the trainings need the memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.sweeping.cells import Cell, CheckedCell, Place, arguments, overlay
from experiments.sweeping.settings import digest, merged
from experiments.sweeping.spec import Sweep
from lightning_modules.errors import UserInputError


def checked_cells(
    sweep: Sweep, place: Place, cells: Sequence[Cell], checkpoints: Sequence[Path] = ()
) -> tuple[list[CheckedCell], dict[Path, int]]:
    """Parses, builds and checks what `dtr-lab train` would for the first seed of each cell; nothing is trained.

    Args:
        sweep: The sweep.
        place: Where its runs go.
        cells: The cells.
        checkpoints: Files that trainings may go on from.

    Returns:
        The cells with their whole configurations; and the step of each checkpoint that can be read.

    Raises:
        UserInputError: If the trainer refuses a cell, two cells are the same training, or a setting of `seeded` is in
            none.
    """
    with tempfile.TemporaryDirectory(prefix="dtr-lab-") as folder:
        seed = {"seed_everything": sweep.seeds[0]}
        commands = [
            arguments(sweep, place, overlay(merged(cell.settings, seed), Path(folder) / f"{i}.yaml"), cell.name, {})
            for i, cell in enumerate(cells)
        ]
        answer = _ask({"commands": commands, "checkpoints": [str(path) for path in checkpoints]}, Path(folder))
    refused = [(cell, said["refused"]) for cell, said in zip(cells, answer["cells"], strict=True) if "refused" in said]
    if refused:
        others = ", ".join(cell.name for cell, _ in refused[1:])
        more = f"\nrefused, too: {others}" if others else ""
        first, reason = refused[0]
        own = ", ".join(f"{key}={value}" for key, value in first.settings.items() if sweep.settings.get(key) != value)
        raise UserInputError(
            f"{sweep.path}: {first.name} cannot be trained: {reason}\nit sets {own or 'nothing'}{more}"
        )
    checked = [
        CheckedCell.of(cell, said["configuration"], sweep.seeded)
        for cell, said in zip(cells, answer["cells"], strict=True)
    ]
    unknown = [key for key in sweep.seeded if not any(key in cell.seeded for cell in checked)]
    if unknown:
        raise UserInputError(f"{sweep.path}: seeded: no run has the setting {unknown[0]}: correct it, or leave it out")
    _refuse_twins(sweep, checked)
    steps = zip(checkpoints, answer["checkpoints"], strict=True)
    return checked, {path: step for path, step in steps if step is not None}


def _refuse_twins(sweep: Sweep, cells: Sequence[CheckedCell]) -> None:
    """Two names for one training would show its noise as a difference, or as agreement."""
    known: dict[str, str] = {}
    for checked in cells:
        twin = known.setdefault(digest(checked.resolved), checked.cell.name)
        if twin != checked.cell.name:
            raise UserInputError(
                f"{sweep.path}: {twin} and {checked.cell.name} are the same training in all settings: leave out one"
            )


def _ask(question: dict[str, Any], folder: Path) -> dict[str, Any]:
    answer = folder / "answer.json"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sweeping.checking", str(answer)],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not answer.is_file():
        if done.returncode < 0:
            raise UserInputError(
                f"the process that checks the configurations was stopped by signal {-done.returncode}: if nobody did "
                "that, this machine ran out of memory"
            )
        raise RuntimeError(f"checking the configurations failed ({done.returncode}):\n{done.stderr}")
    return json.loads(answer.read_text())


def main(path: str) -> None:
    """In the process of its own: a question as JSON on standard input, the answer into the file ``path``."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    question = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        check = _Checker()
        answer = {
            "cells": [check.cell(command) for command in question["commands"]],
            "checkpoints": [check.checkpoint(checkpoint) for checkpoint in question["checkpoints"]],
        }
    Path(path).write_text(json.dumps(answer, default=str))


class _Checker:
    def __init__(self) -> None:
        from experiments.train import quieten

        quieten()
        self.data: dict[str, Any] = {}

    def cell(self, command: list[str]) -> dict[str, Any]:
        """The whole configuration, or why it is refused."""
        from experiments.train import check_fit, configure

        try:
            cli = configure(command)
            configuration = yaml.safe_load(cli.parser.dump(cli.config, skip_link_targets=False))
            # One data module for all cells that have the same: a folder with a million images is listed once.
            data = self.data.setdefault(digest(configuration["data"]), cli.datamodule)
            check_fit(cli.model, data, cli.trainer)
        except UserInputError as error:
            return {"refused": str(error)}
        return {"configuration": configuration}

    def checkpoint(self, path: str) -> int | None:
        """Its step; None if it cannot be gone on from, damaged by a crash for instance."""
        from lightning_modules.checkpoint import read_checkpoint
        from lightning_modules.tracking.callback import tracking_state_in

        try:
            return tracking_state_in(read_checkpoint(path), path).step
        except UserInputError:
            return None


if __name__ == "__main__":
    main(sys.argv[1])
