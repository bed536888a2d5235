"""The main job, end to end: ``dtr-lab demo``, twice, and the notebook on what it leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import papermill
import pytest
from mlflow import MlflowClient

from lightning_modules.tracking import records

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "01_quickstart.ipynb"
README = ROOT / "README.md"


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-m", "experiments", "demo", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two demos ran, the first with two seeds and the second with one; what they said lies beside."""
    folder = tmp_path_factory.mktemp("demo")
    for number, seeds in enumerate((["0", "1"], ["5"])):
        # The second without affinities: reports, notebooks and views must do without them too.
        done = demo(folder, "--steps", "110", "--seeds", *seeds, *(["--no-affinity"] if number else []))
        assert done.returncode == 0, done.stderr
        (folder / f"said-{number}.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def client(folder) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def by_comparison(client) -> dict[str, list]:
    (experiment,) = (e for e in client.search_experiments() if e.name == "digits-demo")
    found: dict[str, list] = {}
    for run in client.search_runs([experiment.experiment_id]):
        found.setdefault(run.data.tags[records.TAG_COMPARISON], []).append(run)
    return found


def test_it_ends_with_a_table_a_verdict_and_where_to_look(folder):
    said = (folder / "said-0.txt").read_text()
    for expected in ("Final validation", "Conflict rate", "Random routing", "95 % paired interval", "report.html"):
        assert expected in said
    command = said.strip().splitlines()[-1]
    assert "dtr-lab ui --experiment digits-demo --comparison demo-" in command


def test_every_run_is_finished_complete_and_under_its_comparison(client):
    comparisons = by_comparison(client)
    assert sorted(len(runs) for runs in comparisons.values()) == [4, 7], "the second demo adds to the first"
    for runs in comparisons.values():
        (parent,) = (run for run in runs if run.data.tags[records.TAG_KIND] == "comparison")
        children = [run for run in runs if run is not parent]
        assert {run.info.status for run in runs} == {"FINISHED"}
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
        assert {run.data.tags[records.TAG_METHOD] for run in children} == {"baseline", "random", "dtr"}
        assert "report.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}
        for run in children:
            assert {"loss/val", "conflict/rate", "activation/effective_channels"} <= set(run.data.metrics)


def test_the_report_is_one_file(folder):
    (report,) = sorted(folder.glob("runs/demo-*/report.html"))[:1]
    page = report.read_text()
    assert len(page) < 5e6
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_the_quickstart_notebook_runs_on_it_as_it_is(folder, tmp_path):
    executed = papermill.execute_notebook(NOTEBOOK, tmp_path / "out.ipynb", cwd=str(folder), progress_bar=False)
    pictures = [o for cell in executed.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 5


def test_an_interrupted_demo_leaves_no_run_open(tmp_path):
    command = [sys.executable, "-m", "experiments", "demo", "--seeds", "0"]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    client = None
    deadline = time.monotonic() + 120
    while client is None or len(client.search_runs(["1"])) < 3:  # the comparison and two trainings
        assert time.monotonic() < deadline
        time.sleep(0.5)
        if client is None and (tmp_path / "mlflow.db.lock").exists() and list(tmp_path.glob("runs/*/logs/*")):
            client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=90)
    assert process.returncode == 130
    assert {run.info.status for run in client.search_runs(["1"])} == {"KILLED"}


def test_the_readmes_python_runs(folder):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(blocks) == 3
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_bad_arguments_are_refused(tmp_path):
    for arguments in (["--steps", "0"], ["--seeds", "1", "1"], ["--tracking-uri", "foo://x"]):
        done = demo(tmp_path, *arguments)
        assert done.returncode == 2
        assert "error:" in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
