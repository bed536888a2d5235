"""Every notebook executes from top to bottom, and is stored without outputs."""

import json
from pathlib import Path

import papermill
import pytest

from tests.analysis import synthetic

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic.make_store(tmp_path_factory.mktemp("store"))


def cells(path):
    return json.loads(path.read_text())["cells"]


def source(cell):
    return "".join(cell["source"])


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS][:1] == ["01_quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_executes(path, store, tmp_path):
    parameters = {"tracking_uri": store, "experiment": synthetic.EXPERIMENT, "comparison": synthetic.COMPARISON}
    executed = papermill.execute_notebook(path, tmp_path / path.name, parameters, cwd=tmp_path, progress_bar=False)
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    said = "".join(output.get("text", "") for output in outputs)
    assert "DTR ends lower than Baseline" in said
    assert "Warning" not in said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stripped_short_and_without_functions(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert all(len(source(cell).splitlines()) <= 8 for cell in code)
    assert not any("def " in source(cell) or "lambda" in source(cell) for cell in code)
    parameters = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(parameters) == 1
    for name in ("experiment", "comparison", "tracking_uri"):
        assert name in source(parameters[0])
    assert any("make demo" in source(cell) for cell in cells(path) if cell["cell_type"] == "markdown")
