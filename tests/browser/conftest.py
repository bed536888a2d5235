"""A store worth looking at, ``dtr-lab ui`` on it, and a headless browser."""

import base64
import dataclasses
import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from experiments.ui import _free_port
from lightning_modules.tracking.store import ensure_experiment, mlflow_client

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
CHROMIUM_FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=1600,1000
"""


@dataclasses.dataclass(frozen=True)
class DemoStore:
    """What the browser should find.

    Attributes:
        training_runs: Names of the comparison's training runs.
        comparison_run: Name of the run that holds ``report.html``.
        heatmap_steps: Steps at which every training run logged the image ``conflict_cosine``.
    """

    tracking_uri: str
    experiment: str
    comparison: str
    comparison_run: str
    training_runs: list[str]
    heatmap_steps: list[int]


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory) -> DemoStore:
    """Two comparisons in one experiment, so that showing the runs of one is a feat."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    client = mlflow_client(uri)
    experiment_id = ensure_experiment(client, uri, "digits-demo")
    _log_comparison(client, experiment_id, "demo-older")
    training_runs = _log_comparison(client, experiment_id, "demo-newer")
    return DemoStore(uri, "digits-demo", "demo-newer", "comparison demo-newer", training_runs, [50, 100, 150])


def _log_comparison(client: MlflowClient, experiment_id: str, name: str) -> list[str]:
    tags = {"dtr.comparison": name, "dtr.kind": "comparison"}
    parent = client.create_run(experiment_id, tags=tags, run_name=f"comparison {name}").info.run_id
    client.log_text(parent, _report(name), "report.html")
    runs = []
    for number, method in enumerate(("baseline", "random", "dtr")):
        tags = {"dtr.comparison": name, "dtr.kind": "training", "dtr.method": method, "mlflow.parentRunId": parent}
        run_id = client.create_run(experiment_id, tags=tags, run_name=f"{method}-of-{name}").info.run_id
        runs.append(f"{method}-of-{name}")
        keys = ("loss/train", "loss/val", "conflict/rate")
        curve = [Metric(key, float(np.exp(-step / 50)) + number, 1, step) for step in range(200) for key in keys]
        client.log_batch(run_id, metrics=curve)
        for step in (50, 100, 150):
            client.log_image(run_id, _heatmap(seed=step + number), key="conflict_cosine", step=step)
        client.set_terminated(run_id)
    client.set_terminated(parent)
    return runs


def _heatmap(seed: int) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((32, 32, 1), dtype=np.uint8))


def _report(name: str) -> str:
    picture = io.BytesIO()
    Image.fromarray(_heatmap(seed=0)).save(picture, format="png")
    inline = base64.b64encode(picture.getvalue()).decode()
    return f"<h1>Comparison {name}</h1><img src='data:image/png;base64,{inline}'>"


@pytest.fixture(scope="session")
def links(demo_store) -> Iterator[dict[str, str]]:
    """What ``dtr-lab ui`` prints, ``runs`` and ``report``, while its server runs."""
    command = [sys.executable, "-m", "experiments", "ui", "--tracking-uri", demo_store.tracking_uri]
    command += ["--experiment", demo_store.experiment, "--comparison", demo_store.comparison]
    command += ["--port", str(_free_port(5600))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found: dict[str, str] = {}
    for line in process.stdout:
        what, _, url = line.strip().partition(" ")
        if url.strip().startswith("http://127.0.0.1:"):
            found[what] = url.strip()
        if "report" in found:
            break
    yield found
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0


@pytest.fixture(scope="session")
def session_browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*CHROMIUM_FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(session_browser, request, tmp_path) -> Iterator[webdriver.Chrome]:
    """The browser on an empty page; leaves a screenshot of what it showed if the test fails."""
    session_browser.get("about:blank")  # else a link that differs after the # only would not load anew
    failed_before = request.session.testsfailed
    yield session_browser
    if request.session.testsfailed > failed_before:
        path = tmp_path / "failure.png"
        session_browser.save_screenshot(str(path))
        print(f"screenshot: {path}")
