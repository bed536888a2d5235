"""The demo's store, ``dtr-lab ui`` on it, and a headless browser."""

import dataclasses
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from mlflow.entities import Run
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from experiments.demo import EXPERIMENT
from experiments.ui import _free_port
from lightning_modules.tracking.publisher import published_images
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
    """What a short ``dtr-lab demo`` leaves behind, beside an older comparison in the same experiment."""
    folder = tmp_path_factory.mktemp("demo")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = mlflow_client(uri)
    experiment_id = ensure_experiment(client, uri, EXPERIMENT)
    older = {"dtr.comparison": "older", "dtr.kind": "training", "dtr.method": "dtr"}
    client.set_terminated(client.create_run(experiment_id, tags=older, run_name="dtr-older").info.run_id)

    command = [sys.executable, "-m", "experiments", "demo", "--seeds", "0", "--steps", "110"]
    command += ["--tracking-uri", uri, "--run-dir", str(folder / "runs")]
    subprocess.run(command, check=True, timeout=400)

    runs = client.search_runs([experiment_id], filter_string="tags.`dtr.comparison` != 'older'")
    by_kind: dict[str, list[Run]] = {"training": [], "comparison": []}
    for run in runs:
        by_kind[run.data.tags["dtr.kind"]].append(run)
    assert len(by_kind["training"]) == 3
    (comparison,) = by_kind["comparison"]
    images = published_images(client, by_kind["training"][0].info.run_id)
    return DemoStore(
        tracking_uri=uri,
        experiment=EXPERIMENT,
        comparison=comparison.data.tags["dtr.comparison"],
        comparison_run=comparison.info.run_name,
        training_runs=[run.info.run_name for run in by_kind["training"]],
        heatmap_steps=sorted(step for key, step, _ in images if key == "conflict_cosine"),
    )


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
