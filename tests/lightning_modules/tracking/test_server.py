"""A real MLflow server that goes away in the middle of a run and comes back."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import requests
from mlflow import MlflowClient

from lightning_modules.tracking import records
from lightning_modules.tracking.logger import TrackingLogger
from lightning_modules.tracking.sync import sync

from .support import artifacts, history, images, losses, picture, rows


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(store, folder, port):
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend-store-uri", store, "--artifacts-destination", str(folder)]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "OMP_NUM_THREADS": "1"}
    with (folder.parent / "server.log").open("a") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = time.monotonic() + 90
        while True:
            assert process.poll() is None, (folder.parent / "server.log").read_text()
            assert time.monotonic() < end, "the server did not start"
            try:
                requests.get(f"http://127.0.0.1:{port}/health", timeout=2).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def hand_over(writer, steps):
    for step in steps:
        writer.log_metrics({"loss/train": float(step)}, step)
        writer.log_rows(records.TIMESTEP_LOSS, losses(step))
    writer.log_image("conflict_cosine", picture(), steps[-1])
    writer.commit()


def test_a_server_that_goes_away_and_comes_back_costs_nothing(store, port, tmp_path, hasty, monkeypatch, caplog):
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "0")  # so that what the store sets is undone after the test
        monkeypatch.delenv(name)
    uri = f"http://127.0.0.1:{port}"
    (tmp_path / "served").mkdir()
    with caplog.at_level(logging.WARNING):
        with server(store, tmp_path / "served", port):
            logger = TrackingLogger(uri, run_dir=str(tmp_path / "runs"))
            writer = logger.writer
            hand_over(writer, [1, 2, 3])
        start = time.monotonic()
        hand_over(writer, [4, 5, 6])
        assert time.monotonic() - start < 2
        while "training goes on" not in caplog.text:
            time.sleep(0.05)
        time.sleep(1.0)  # many attempts
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
        writer.close(timeout=0.2)
        assert f"dtr-lab sync {writer.directory}" in caplog.text
    with server(store, tmp_path / "served", port):
        sync(writer.directory)
        client = MlflowClient(tracking_uri=uri)
        assert client.get_run(logger.run_id).info.status == "FINISHED"
        assert history(client, logger.run_id, "loss/train") == [(step, float(step)) for step in range(1, 7)]
        assert images(client, logger.run_id) == {
            ("conflict_cosine", step, kind): 1 for step in (3, 6) for kind in ("png", "webp")
        }
        assert len(rows(client, logger.run_id, records.TIMESTEP_LOSS)) == 24
        assert "telemetry/timestep_loss/a001-000000.parquet" in artifacts(client, logger.run_id)
