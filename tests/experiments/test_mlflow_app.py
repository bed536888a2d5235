"""The page by which `dtr-lab ui` lets a browser in, beside MLflow's own; tests/browser shows what it changes."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

_QUESTIONS = """
from starlette.testclient import TestClient
from experiments.mlflow_app import START, app
client = TestClient(app, base_url="http://127.0.0.1")
page = client.get(START)
assert page.status_code == 200 and "mlflow.workflowType_v1" in page.text, page.text
assert page.headers["cache-control"] == "no-store"
assert client.get("/health").text == "OK"
assert client.get(START, headers={"host": "elsewhere.example"}).status_code == 403, "MLflow's guard holds here too"
"""


def test_it_is_found_by_mlflow():
    (entry,) = (e for e in importlib.metadata.entry_points(group="mlflow.app") if e.name == "dtr-lab")
    assert entry.value == "experiments.mlflow_app:app"


def test_the_page_is_served_beside_mlflows_own(tmp_path):
    # In a process of its own: MLflow's server reads its store from the environment when it is imported.
    environment = {"PATH": "", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{tmp_path}/mlflow.db"
    done = subprocess.run(
        [sys.executable, "-c", _QUESTIONS], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
