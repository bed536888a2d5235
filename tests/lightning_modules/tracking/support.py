"""Small runs to log, a client whose store goes away, and means to read a run back without the code under test."""

from __future__ import annotations

import io
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from mlflow import MlflowClient

from lightning_modules.tracking import records


def losses(step):
    return {
        "step": step,
        "window_start": step,
        "split": "train",
        "quantity": "mse",
        "timestep": np.arange(4),
        "count": np.ones(4, dtype=int),
        "sum": np.full(4, float(step)),
        "sum_sq": np.ones(4),
    }


def picture(value=0):
    return np.full((300, 400, 3), value, dtype=np.uint8)


class Unreliable:
    """A client whose store goes away, or dislikes some calls."""

    def __init__(self, client):
        self.client = client
        self.away = False
        self.refuse = lambda name, arguments: None
        self.calls = 0

    def __getattr__(self, name):
        method = getattr(self.client, name)

        def call(*args, **kwargs):
            self.calls += 1
            if self.away:
                raise ConnectionError("the store is away\nwith details")
            error = self.refuse(name, (args, kwargs))
            if error is not None:
                raise error
            return method(*args, **kwargs)

        return call


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


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
