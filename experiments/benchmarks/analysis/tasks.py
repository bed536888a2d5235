"""What is measured, each in a process of its own: ``python -m experiments.benchmarks.analysis.tasks TASK URI ...``.

A fresh process knows its own peak of memory, and nothing of what the others have read before. It prints one JSON
object.
"""

from __future__ import annotations

import functools
import importlib
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONG, COMPARED, LARGER, LOGGED = "long", "compared", "larger", "logged"
"""Experiments of the store, and the task that each is for."""

Numbers = dict[str, Any]


def measure_long(uri: str) -> Numbers:
    """Loads one long run and reduces it to what figures and tables show of it."""
    numbers: Numbers = {}
    with _timed(numbers, "import_seconds"):
        _import("analysis.runs", "analysis.frames", "analysis.conflict", "analysis.noise", "analysis.activations")
    from analysis import activations, conflict, frames, gramians, noise, significance
    from analysis.runs import load_runs

    parts: Numbers = {}
    with _timed(numbers, "seconds"):
        with _timed(parts, "read"):
            (run,) = load_runs(uri, experiment=LONG)
        with _timed(parts, "curves"):
            frames.curves_frame([run])
        for level in ("total", "layer"):
            with _timed(parts, f"pool {level}"):
                pooled = gramians.pool_runs([run], level)  # type: ignore[arg-type]
            with _timed(parts, f"corrected cosine {level}"):
                conflict.corrected_cosine(*pooled)
            with _timed(parts, f"z-scores {level}"):
                significance.z_scores(*pooled)
            with _timed(parts, f"conflict rate {level}"):
                significance.conflict_rate(*pooled)
            with _timed(parts, f"noise scale {level}"):
                noise.noise_scale(*pooled)
        with _timed(parts, "channel usage"):
            activations.channel_usage(activations.late_energy(run).mean(activations.STEP))
    return {**numbers, "parts": parts, "peak_rss_gb": peak_rss_bytes() / 1e9}


def measure_compared(uri: str, experiment: str = COMPARED) -> Numbers:
    """Compares all runs as ``dtr-lab compare`` does, tables, figures and page included, and logs nothing."""
    numbers: Numbers = {}
    with _timed(numbers, "import_seconds"):
        _import("analysis.runs", "analysis.report.page", "experiments.compare", "lightning_modules.tracking.store")
        _import("mlflow.store.tracking.sqlalchemy_store")  # which MLflow puts off to the first client
    from experiments.compare import compare

    with tempfile.TemporaryDirectory() as out:
        with _timed(numbers, "seconds"):
            compare(uri, experiment=experiment, out=out, log=False)
        numbers["figures"] = len(list(Path(out).glob("figures/*.png")))
        numbers["report_mb"] = (Path(out) / "report.html").stat().st_size / 1e6
    return {**numbers, "peak_rss_gb": peak_rss_bytes() / 1e9}


def measure_logged(uri: str, rounds: int) -> Numbers:
    """Reads the same numbers of one run from MLflow's metrics and from Parquet, in turn, after one round unmeasured."""
    from mlflow import MlflowClient

    from analysis.runs import load_runs

    client = MlflowClient(tracking_uri=uri)
    seconds: dict[str, list[float]] = {"metrics": [], "parquet": []}
    for _ in range(1 + rounds):
        took: Numbers = {}
        with _timed(took, "parquet"):
            (run,) = load_runs(uri, experiment=LOGGED)
        run_id = run.attrs["run_id"]
        with _timed(took, "metrics"):
            keys = sorted(client.get_run(run_id).data.metrics)
            histories = {key: [point.value for point in client.get_metric_history(run_id, key)] for key in keys}
        for way, each in took.items():
            seconds[way].append(each)
    _check_same(run, histories)
    return {way: each[1:] for way, each in seconds.items()} | {"keys": len(keys), "values": _count(histories)}


def _check_same(run: Any, histories: dict[str, list[float]]) -> None:
    """That both ways give the same numbers, by their sums."""
    import numpy as np

    upper = np.triu(np.ones((run.sizes["task"] * run.sizes["half"],) * 2))
    from_parquet = {
        "timestep_loss": float(run["train_loss"].sum()),
        "gramian": float((run["gramian"].values.reshape(-1, *upper.shape) * upper).sum()),
    }
    for table, expected in from_parquet.items():
        found = sum(sum(values) for key, values in histories.items() if key.startswith(f"{table}/"))
        if not np.isclose(found, expected, rtol=1e-6):
            raise AssertionError(f"metrics of {table} add up to {found}, its rows in Parquet to {expected}")


def _count(histories: dict[str, list[float]]) -> int:
    return sum(len(values) for values in histories.values())


def peak_rss_bytes() -> int:
    """The most memory that this process had at a time.

    `getrusage` also counts what the parent held when it started this process, so Linux is asked for this one's own.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def _timed(into: Numbers, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    into[name] = time.perf_counter() - started


def _import(*names: str) -> None:
    for name in names:
        importlib.import_module(name)


TASKS: dict[str, Callable[..., Numbers]] = {
    LONG: measure_long,
    COMPARED: measure_compared,
    LARGER: functools.partial(measure_compared, experiment=LARGER),
    LOGGED: measure_logged,
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    task, store, *numbers_given = sys.argv[1:]
    print(json.dumps(TASKS[task](store, *map(int, numbers_given))))
