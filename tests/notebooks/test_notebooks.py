"""Every notebook executes from top to bottom, is stored without outputs, and has a rendered copy that is not stale."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import papermill
import pytest
from mlflow import MlflowClient

from lightning_modules.tracking import records
from tests.analysis import measured, synthetic

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ["01_quickstart", "02_gradient_conflict", "03_task_affinity", "04_convergence", "05_channels"]
PICTURES = {"01_quickstart": 5, "02_gradient_conflict": 6, "03_task_affinity": 8, "04_convergence": 6, "05_channels": 8}
"""The least number of pictures that each shows."""


@pytest.fixture(scope="module")
def plain_store(tmp_path_factory):
    """Runs without anything that `dtr-lab affinity` or `dtr-lab specialists` add."""
    return synthetic.make_store(tmp_path_factory.mktemp("plain"), seeds=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three seeds of each method, measured in every way, and the specialists of two seeds."""
    uri = synthetic.make_store(tmp_path_factory.mktemp("store"), seeds=3)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(synthetic.EXPERIMENT).experiment_id
    for run in client.search_runs([experiment]):
        root = Path(url2pathname(urlparse(run.info.artifact_uri).path))
        measured.write_everything(root / records.TELEMETRY_DIR, seed=int(run.data.tags[records.TAG_SEED]))
    for seed in range(2):
        for task in range(synthetic.K):
            synthetic.add_run(client, experiment, "baseline", seed, task=task)
    return uri


def execute(name, store, tmp_path):
    """The outputs of its code cells."""
    parameters = {"tracking_uri": store, "experiment": synthetic.EXPERIMENT, "comparison": synthetic.COMPARISON}
    executed = papermill.execute_notebook(
        FOLDER / f"{name}.ipynb", tmp_path / "out.ipynb", parameters, cwd=tmp_path, progress_bar=False
    )
    return [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


def said(outputs):
    return "".join("".join(output.get("text", "")) for output in outputs)


def cells(path):
    return json.loads(path.read_text())["cells"]


def source(cell):
    return "".join(cell["source"])


def test_there_are_the_notebooks_that_the_readme_names():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_executes(name, store, tmp_path):
    outputs = execute(name, store, tmp_path)
    assert pictures(outputs) >= PICTURES[name]
    assert "Warning" not in said(outputs)
    if name == "01_quickstart":
        assert "DTR ends lower than Baseline" in said(outputs)


def test_what_was_not_measured_is_told_and_not_drawn(plain_store, tmp_path):
    outputs = execute("03_task_affinity", plain_store, tmp_path)
    assert "with measured affinities: 0" in said(outputs)
    assert "no specialists: train some with `dtr-lab specialists`" in said(outputs)
    assert "no measured look-aheads" in said(outputs)
    assert pictures(outputs) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_stripped_short_and_without_functions(name):
    path = FOLDER / f"{name}.ipynb"
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert all(len(source(cell).splitlines()) <= 9 for cell in code)
    assert all(len(line) <= 120 for cell in code for line in source(cell).splitlines())
    assert not any(re.search(r"\b(def|lambda|class) ", source(cell)) for cell in code)
    parameters = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(parameters) == 1
    for setting in ("experiment", "comparison", "tracking_uri"):
        assert setting in source(parameters[0])
    assert any("make demo" in source(cell) for cell in cells(path) if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("name", NAMES)
def test_the_rendered_copy_is_of_this_notebook_and_of_real_runs(name):
    rendered = cells(FOLDER / "rendered" / f"{name}.ipynb")
    assert [source(cell) for cell in rendered] == [source(cell) for cell in cells(FOLDER / f"{name}.ipynb")]
    outputs = [output for cell in rendered if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert pictures(outputs) >= PICTURES[name]
    assert not any(output["output_type"] == "error" for output in outputs)
    text = json.dumps(outputs)
    assert "synthetic" not in text
    if name == "05_channels":
        assert "'Baseline': [0, 1, 2" in text, "at least three seeds of each method"
    assert "/work" not in text, "a path of the machine that rendered it"
