"""An MLflow store with finished runs of generated telemetry, and the same numbers as MLflow metrics."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pyarrow.parquet as pq
from mlflow.entities import Metric

from experiments.benchmarks.analysis.generate import write_telemetry
from experiments.benchmarks.analysis.workloads import Workload
from lightning_modules.tracking import records
from lightning_modules.tracking.store import ensure_experiment, mlflow_client

_BATCH = 1000
"""Metrics that MLflow takes in one request."""


def add_runs(uri: str, experiment: str, workload: Workload, methods: Iterable[str], seeds: int) -> list[str]:
    """Adds one comparison of finished runs to a store, which is set up if need be; returns their ids."""
    client = mlflow_client(uri)
    experiment_id = ensure_experiment(client, uri, experiment)
    ids = []
    for method, seed in itertools.product(methods, range(seeds)):
        tags = {
            records.TAG_KIND: records.KIND_TRAINING,
            records.TAG_METHOD: method,
            records.TAG_SEED: str(seed),
            records.TAG_COMPARISON: experiment,
        }
        info = client.create_run(experiment_id, run_name=f"{method}-{seed}", tags=tags).info
        write_telemetry(telemetry_folder(info.artifact_uri), workload, method, seed)
        client.set_terminated(info.run_id, "FINISHED")
        ids.append(info.run_id)
    return ids


def telemetry_folder(artifact_uri: str) -> Path:
    """Where the telemetry of a run with local artifacts lies."""
    return Path(url2pathname(urlparse(artifact_uri).path)) / records.TELEMETRY_DIR


def log_as_metrics(uri: str, run_id: str) -> int:
    """Logs every loss moment and inner product of a run's telemetry as MLflow metrics; returns how many values."""
    client = mlflow_client(uri)
    folder = telemetry_folder(client.get_run(run_id).info.artifact_uri)
    metrics = list(_metrics(folder))
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
    return len(metrics)


def _metrics(folder: Path) -> Iterator[Metric]:
    for path in sorted((folder / records.TIMESTEP_LOSS).glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            for moment in ("count", "sum", "sum_sq"):
                key = f"timestep_loss/{row['quantity']}/{moment}/t{row['timestep']:04d}"
                yield Metric(key, float(row[moment]), row["step"], row["step"])
    for path in sorted((folder / records.GRADIENT_GRAMIAN).glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            groups = len(row["group_count"])
            for one, other in itertools.combinations_with_replacement(range(groups), 2):
                key = f"gramian/{row['layer']}/{one:02d}-{other:02d}"
                yield Metric(key, row["gramian"][one * groups + other], row["step"], row["step"])
