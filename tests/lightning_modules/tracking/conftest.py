"""A fresh SQLite store per test, and means to read a run back without the code under test."""

from __future__ import annotations

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import io
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from lightning_modules.tracking import delivery, outbox, records


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


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    """All points of a metric as (step, value), in order of steps; twice-logged ones stand twice."""
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


def artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> dict[str, bytes]:
    """All files of a run by path."""
    found = {}
    for entry in client.list_artifacts(run_id, folder):
        if entry.is_dir:
            found.update(artifacts(client, run_id, entry.path))
        else:
            found[entry.path] = Path(client.download_artifacts(run_id, entry.path)).read_bytes()
    return found


def images(client: MlflowClient, run_id: str) -> Counter[tuple[str, int, str]]:
    """How often each (key, step, "png" or "webp") lies in images/."""
    names = [Path(path).name for path in artifacts(client, run_id, "images")]
    return Counter((name.split("+")[0], int(name.split("+")[2]), name.rpartition(".")[2]) for name in names)


def rows(client: MlflowClient, run_id: str, table: str) -> pd.DataFrame:
    """A table as `records.META_RESUMED_FROM` says it is to be read."""
    shards = []
    for content in artifacts(client, run_id, f"{records.TELEMETRY_DIR}/{table}").values():
        shard = pq.read_table(io.BytesIO(content))
        meta = shard.schema.metadata
        shards.append((int(meta[records.META_ATTEMPT]), int(meta[records.META_RESUMED_FROM]), shard.to_pandas()))
    kept = []
    for attempt, _, frame in shards:
        limits = [resumed for later, resumed, _ in shards if later > attempt]
        kept.append(frame[frame["step"] <= min(limits)] if limits else frame)
    return pd.concat(kept, ignore_index=True).sort_values("step", ignore_index=True)
