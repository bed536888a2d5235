"""A fresh SQLite store per test; the threads hurry."""

from __future__ import annotations

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import shutil

import pytest
from mlflow import MlflowClient

from lightning_modules.tracking import delivery, outbox
from lightning_modules.tracking.writer import RunWriter

from .support import Unreliable


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """An initialised database: MLflow takes seconds to make one, a copy is free."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(tmp_path, empty_database, monkeypatch):
    """URI of a new, empty store in `tmp_path`."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def client(store):
    return MlflowClient(tracking_uri=store)


@pytest.fixture
def run_id(client, tmp_path):
    experiment = client.create_experiment("test", artifact_location=(tmp_path / "artifacts").as_uri())
    return client.create_run(experiment).info.run_id


@pytest.fixture
def hasty(monkeypatch):
    """Shortens all waiting of the threads."""
    monkeypatch.setattr(outbox, "_FLUSH_SECONDS", 0.02)
    monkeypatch.setattr(delivery, "_FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(delivery, "_LONGEST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(delivery, "_LAST_PAUSE_SECONDS", 0.05)


@pytest.fixture
def unreliable(client):
    return Unreliable(client)


@pytest.fixture
def make_writer(client, run_id, store, tmp_path, hasty):
    opened = []

    def make(client=client, **options):
        writer = RunWriter(client, run_id, tmp_path / "runs", store, **options)
        opened.append(writer)
        return writer

    yield make
    for writer in opened:
        writer.close(timeout=0.0)
