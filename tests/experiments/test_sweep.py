"""`dtr-lab sweep` with small real trainings: a killed sweep, a failing cell, a search; and what it refuses."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from experiments.__main__ import main
from experiments.sweep import _ends_as_by_ctrl_c
from experiments.sweeping import checking
from experiments.train import configure
from lightning_modules.tracking import records
from tests.experiments.sweeping.helpers import GRID, ROUTED, SEARCH, TINY, changed, written


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # trainings find the crash of `tests`


@pytest.fixture
def checks_here(monkeypatch):
    """Lets configurations be checked in this process, which has torch already."""

    def ask(question, folder):
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(question)))
        checking.main(str(folder / "answer.json"))
        return json.loads((folder / "answer.json").read_text())

    monkeypatch.setattr(checking, "_ask", ask)


@pytest.fixture
def results(monkeypatch):
    """Stands in for the tables and figures; the calls."""
    calls = []
    module = types.ModuleType("experiments.grid_results")
    module.write_results = lambda uri, **options: calls.append({"uri": uri, **options})
    monkeypatch.setitem(sys.modules, "experiments.grid_results", module)
    return calls


def runs(comparison: str) -> dict[str, list]:
    """All runs of a comparison by name, the parent among them; deleted ones are left out."""
    client = MlflowClient()
    found: dict[str, list] = {}
    for run in client.search_runs([client.get_experiment_by_name("digits").experiment_id]):
        if run.data.tags.get(records.TAG_COMPARISON) == comparison:
            found.setdefault(run.info.run_name, []).append(run)
    return found


def statuses(comparison: str) -> dict[str, list[str]]:
    return {name: [run.info.status for run in each] for name, each in runs(comparison).items()}


def test_a_sweep_killed_midway_goes_on_and_doubles_nothing(tmp_path, checks_here, capsys):
    steps = {"trainer.max_steps": 400, "trainer.val_check_interval": 200, "checkpoint.every_n_steps": 25}
    settings = TINY | steps | {"timestep_loss.every_n_steps": 100}
    path = written(changed(GRID, settings=settings, axes={"routing": GRID["axes"]["routing"]}))
    command = [sys.executable, "-m", "experiments", "sweep", f"--config={path}", "--workers=1", "--no-compare"]
    sweep = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")):
        assert sweep.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sweep.kill()
    sweep.wait()
    (killed,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    assert not runs("tiny").keys() & {"random-seed0"}

    assert main(["sweep", f"--config={path}", "--no-compare"]) == 0
    said = capsys.readouterr().out
    assert "Sweep tiny: 2 cells x 1 seeds: 1 going on, 1 to train." in said
    assert statuses("tiny") == {
        "plain-seed0": ["FINISHED"],
        "random-seed0": ["FINISHED"],
        "comparison tiny": ["FINISHED"],
    }
    (plain,), (random,), (parent,) = (runs("tiny")[name] for name in ("plain-seed0", "random-seed0", "comparison tiny"))
    assert plain.info.run_id == killed.parts[-3]
    assert plain.data.tags["dtr.attempt"] == "2"
    assert {run.data.tags["mlflow.parentRunId"] for run in (plain, random)} == {parent.info.run_id}
    assert random.data.tags[records.TAG_CELL] == "routing=random"
    assert random.data.tags[records.TAG_METHOD] == "random"

    assert main(["sweep", f"--config={path}", "--no-compare"]) == 0
    assert "2 finished." in capsys.readouterr().out
    assert {name: len(each) for name, each in runs("tiny").items()} == dict.fromkeys(statuses("tiny"), 1)

    assert main(["sweep", f"--config={path}", "--set", "data.init_args.batch_size=8"]) == 2
    refused = capsys.readouterr().err
    assert "plain has other settings than its run plain-seed0" in refused
    assert "data.init_args.batch_size was 16, is 8. Choose another `name`" in refused


def test_a_failing_cell_stops_no_other_and_the_table_is_made_all_the_same(checks_here, results, capsys):
    crash = {"class_path": "tests.experiments.crash.CrashAt", "init_args": {"step": 2}}
    axes = {"kind": {"breaks": {"trainer.callbacks": [crash]}, "random": ROUTED}}
    path = written(changed(GRID, axes=axes, samples=20))
    assert main(["sweep", f"--config={path}", "--seeds", "4", "--results=out"]) == 1
    said = capsys.readouterr()
    assert "breaks-seed4 failed; the end of runs/sweeps/tiny/logs/breaks-seed4.log:" in said.err
    assert "RuntimeError: crash as planned" in said.err
    assert "Failed: breaks-seed4; their logs are in runs/sweeps/tiny/logs" in said.out
    assert statuses("tiny") == {
        "breaks-seed4": ["FAILED"],
        "random-seed4": ["FINISHED"],
        "comparison tiny": ["FAILED"],
    }
    random = runs("tiny")["random-seed4"][0]
    assert (random.data.tags[records.TAG_SEED], random.data.params["routing.seed"]) == ("4", "4")
    (call,) = results
    assert call == {
        "uri": os.environ["MLFLOW_TRACKING_URI"],
        "experiment": "digits",
        "comparison": "tiny",
        "axes": {"kind": ["breaks", "random"]},
        "out": Path("out"),
        "command": "dtr-lab sweep --config sweep.yaml --seeds 4",
        "run_dir": Path("runs"),
        "samples": 20,
    }

    assert main(["sweep", f"--config={path}", "--seeds=4", "--only", "ran*"]) == 0
    assert "1 cells x 1 seeds: 1 finished." in capsys.readouterr().out
    assert statuses("tiny")["comparison tiny"] == ["FINISHED"]
    assert results[1]["out"] == Path("runs/sweeps/tiny")

    assert main(["sweep", f"--config={path}", "--seeds=4", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "  breaks-seed4  to train again (was FAILED)\n  random-seed4  finished (" in said
    assert "1 unfinished run that cannot be gone on with will be deleted in MLflow before training" in said
    assert statuses("tiny")["breaks-seed4"] == ["FAILED"], "a dry run changes nothing"


def test_a_search_ends_with_the_best_and_goes_on_when_more_is_asked(checks_here, capsys):
    path = written(changed(SEARCH, search={**SEARCH["search"], "trials": 2}))
    assert main(["sweep", f"--config={path}"]) == 0
    first = runs("search")
    path = written(SEARCH)
    assert main(["sweep", f"--config={path}", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 ended, 0 going on, 1 to try." in said
    assert "do you mean" not in said
    assert main(["sweep", f"--config={path}"]) == 0
    said = capsys.readouterr().out
    assert "Best of 3 trials: trial " in said
    found = runs("search")
    assert {name: len(each) for name, each in found.items()} == {
        **{f"trial{i}-seed0": 1 for i in range(3)},
        "comparison search": 1,
    }
    assert {run.info.run_id for each in first.values() for run in each} < {
        run.info.run_id for each in found.values() for run in each
    }
    values = [found[f"trial{i}-seed0"][0].data.metrics["loss/val"] for i in range(3)]
    best = values.index(min(values))
    assert f"Best of 3 trials: trial {best}, loss/val = {min(values):.6g}\n" in said
    params = found[f"trial{best}-seed0"][0].data.params
    settings = yaml.safe_load(Path("runs/sweeps/search/best.yaml").read_text())["model"]["init_args"]
    assert settings["optimization"]["learning_rate"] == float(params["optimization.learning_rate"])
    assert settings["loss_weight"]["name"] == params["loss_weight.name"]
    table = Path("runs/sweeps/search/trials.csv").read_text().splitlines()
    assert len(table) == 4
    assert Path("runs/sweeps/search.db").is_file()
    command = shlex.split(said.split("Train it:\n")[1].splitlines()[0])
    assert command[:2] == ["dtr-lab", "train"]
    model = configure(command[2:]).model
    assert model.optimization.learning_rate == settings["optimization"]["learning_rate"]
    assert model.loss_weight.name == settings["loss_weight"]["name"]


def test_a_metric_that_looks_misspelt_is_pointed_out_before_anything_is_trained(checks_here, capsys):
    path = written(changed(SEARCH, search={**SEARCH["search"], "metric": "loss/vall"}))
    assert main(["sweep", f"--config={path}", "--dry-run"]) == 0
    assert "search.metric is 'loss/vall', which DTR Lab does not log" in capsys.readouterr().out


def test_the_end_of_the_process_that_checks_is_told(monkeypatch, capsys):
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(checking.subprocess, "run", lambda *args, **options: killed)
    assert main(["sweep", f"--config={written(GRID)}"]) == 2
    assert "was stopped by signal 9" in capsys.readouterr().err


def test_what_the_trainer_would_refuse_is_refused_before_anything_starts(checks_here, capsys):
    axes = {
        "weight": {"plain": {}, "typo": {"model.init_args.loss_weight.nam": "p2"}, "other": {"trainer.max_step": 1}}
    }
    path = written(changed(GRID, axes=axes, seeded=None))
    assert main(["sweep", f"--config={path}"]) == 2
    refused = capsys.readouterr().err
    assert "sweep.yaml: typo cannot be trained: " in refused
    assert "Group 'loss_weight' does not accept option 'nam'" in refused
    assert "\nit sets model.init_args.loss_weight.nam=p2" in refused
    assert "refused, too: other" in refused
    assert not Path("store.db").exists()


def test_what_cannot_be_compared_is_refused(checks_here, capsys):
    twins = {"weight": {"plain": {}, "uniform": {"model.init_args.loss_weight.name": "uniform"}}}
    path = written(changed(GRID, axes=twins, seeded=None))
    assert main(["sweep", f"--config={path}"]) == 2
    assert "plain and uniform are the same training in all settings" in capsys.readouterr().err
    path = written(changed(GRID, seeded=["model.init_args.routing.sed"]))
    assert main(["sweep", f"--config={path}", "--dry-run"]) == 2
    assert "seeded: no run has the setting model.init_args.routing.sed" in capsys.readouterr().err
    path = written(GRID)
    assert main(["sweep", f"--config={path}", "--only", "plain"]) == 2
    assert "--only plain: no such cell in sweep.yaml; there are: plain-uniform, plain-p2" in capsys.readouterr().err
    assert main(["sweep", f"--config={path}", "--workers=0"]) == 2
    assert "--workers must be at least 1" in capsys.readouterr().err
    assert main(["sweep", f"--config={written(SEARCH)}", "--only=a"]) == 2
    assert "--only names cells of a grid, but sweep.yaml is a search" in capsys.readouterr().err
    assert not Path("store.db").exists()


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, checks_here, capsys):
    assert main(["sweep", f"--config={written(GRID)}", "--seeds", "0", "1", "--dry-run", "--only", "*-p2"]) == 0
    said = capsys.readouterr().out
    names = [f"{routing}-p2-seed{seed}" for seed in (0, 1) for routing in ("plain", "random")]
    assert [line.split() for line in said.splitlines() if "to train" in line][:4] == [
        [name, "to", "train"] for name in names
    ]
    assert "Sweep tiny: 2 cells x 2 seeds: 4 to train." in said
    assert main(["sweep", f"--config={written(SEARCH)}", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "learning_rate: 0.0001 to 0.01 (logarithmic)" in said
    assert "minimize loss/val over 3 trials x 1 seeds of 4 steps: 0 ended, 0 going on, 3 to try." in said
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_a_batch_system_s_signal_is_taken_as_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _ends_as_by_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
