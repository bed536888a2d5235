"""Tests for `experiments/benchmarks/analysis`: that it measures what it says, not how fast anything is."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from analysis.affinity_measures import measured_affinities
from analysis.reading.telemetry import read_telemetry
from experiments.benchmarks.analysis import report, tasks, workloads
from experiments.benchmarks.analysis.generate import write_telemetry
from experiments.benchmarks.analysis.stores import add_runs, log_as_metrics
from experiments.benchmarks.analysis.workloads import FULL, QUICK
from lightning_modules.tracking import outbox, records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("telemetry")
    write_telemetry(folder, QUICK.long, "dtr", seed=0)
    return folder


def test_it_prints_one_object_with_the_numbers_of_the_issue():
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.analysis",
        "--json",
        "--quick",
        "--tasks",
        "long",
        "logged",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result)[:4] == ["load_seconds", "peak_rss_gb", "compare_100_runs_seconds", "speedup_over_metrics"]
    assert result["load_seconds"] == pytest.approx(sum(result["load_parts"].values()), rel=0.2)
    assert 0.05 < result["peak_rss_gb"] < 1
    assert result["compare_100_runs_seconds"] is None  # its task was left out
    assert result["targets_met"] == {"load_seconds": True, "peak_rss_gb": True}
    (logged,) = result["rounds"]["logged"]
    assert result["speedup_over_metrics"] == logged["metrics"][0] / logged["parquet"][0]
    shown = report.table(result)
    assert "target at most 10): met" in shown
    assert "compare                        not measured" in shown


def test_all_figures_of_the_comparison_are_made(tmp_path, monkeypatch):
    """The comparison itself is tested elsewhere, and takes its time."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    ids = add_runs(uri, tasks.COMPARED, QUICK.compared, ["baseline", "dtr"], seeds=1)
    compared = []

    def compare(uri, *, experiment, out, log):
        from analysis.runs import load_runs

        compared.extend(run.attrs["run_id"] for run in load_runs(uri, experiment=experiment, comparison="latest"))
        (Path(out) / "figures").mkdir()
        (Path(out) / "figures" / "one.png").touch()
        (Path(out) / "report.html").write_bytes(bytes(2_000_000))
        (run,) = load_runs(uri, run_ids=ids[:1])
        assert {"look-ahead", "fine-tuning", "representation (CKA)"} <= set(measured_affinities([run]))

    monkeypatch.setattr("experiments.compare.compare", compare)
    measured = tasks.measure_compared(uri)
    assert compared == ids
    assert (measured["figures"], measured["report_mb"]) == (1, 2.0)
    assert tasks.TASKS[tasks.LARGER].keywords == {"experiment": tasks.LARGER}
    assert measured["seconds"] > 0


def test_the_sizes_are_those_of_the_issue():
    long = FULL.long.facts()
    assert long["steps"] == 400_000
    assert long["sample_losses"] > 1e8
    assert (long["gradient_probes"], long["layers"], long["groups"]) == (2_000, 100, 16)
    compared = FULL.compared.facts()
    assert FULL.seeds * len(workloads.METHODS) == 100
    assert (compared["steps"], compared["gradient_probes"], compared["layers"]) == (1_500, 150, 26)
    larger = FULL.larger.facts()
    assert larger["steps"] == 20_000
    assert min(larger["gradient_probes"] - 100, larger["layers"] - 50, larger["blocks"] - 12) >= 0
    for workload in (FULL.long, FULL.compared, FULL.larger, QUICK.long):
        assert len(set(workload.layer_names)) == workload.layers


def test_shards_are_as_long_as_the_writers():
    assert workloads.SHARD_SECONDS == outbox._ROWS_SECONDS
    assert FULL.long.shard_ends()[:2] == [200, 400]
    ends = FULL.larger.shard_ends()
    assert ends[:2] == [1000, 2000]
    early = dataclasses.replace(FULL.larger, checkpoint_every=1500)
    assert early.shard_ends()[:5] == [1000, 1500, 2500, 3000, 4000]
    assert ends[-1] == early.shard_ends()[-1] == FULL.larger.steps


def test_rows_lie_in_the_shard_of_their_step(folder):
    ends = [0, *QUICK.long.shard_ends()]
    numbers = []
    for table in (records.TIMESTEP_LOSS, records.GRADIENT_GRAMIAN, records.CHANNEL_ACTIVATION, records.TRAINING_TIME):
        paths = sorted((folder / table).glob("a001-*.parquet"))
        numbers += [int(path.stem[-6:]) for path in paths]
        for path in paths:
            stored = pq.read_table(path)
            steps = stored["step"].to_numpy()
            place = np.searchsorted(ends, steps)
            assert (place == place[0]).all()
            assert stored.schema.metadata[records.META_ATTEMPT] == b"1"
            assert stored.schema.remove_metadata().equals(records.TABLES[table])
    assert sorted(numbers) == list(range(len(numbers)))


def test_what_is_generated_is_what_its_size_says(folder):
    run, facts = read_telemetry(folder), QUICK.long.facts()
    assert run.sizes["gradient_step"] == facts["gradient_probes"]
    assert run.sizes["layer"] == facts["layers"]
    assert run.sizes["activation_step"] == facts["activation_probes"]
    assert run.sizes["val_step"] == facts["validations"]
    count = run["train_loss"].sel(moment="count")
    assert count.sum(("train_step", "task")).values.tolist() == [facts["sample_losses"]] * 2
    loss = run["train_loss"].sel(moment="sum", quantity="mse").sum("task") / count.sel(quantity="mse").sum("task")
    assert float(loss[0]) > 1.5 * float(loss[-1]) > 0
    eigenvalues = np.linalg.eigvalsh(run["gramian"].values.reshape(-1, facts["groups"], facts["groups"]))
    assert (eigenvalues > -1e-3 * eigenvalues[:, -1:]).all()  # inner products of vectors
    assert run["mask"].any()


def test_the_same_seed_gives_the_same_telemetry(folder, tmp_path):
    write_telemetry(tmp_path / "again", QUICK.long, "dtr", seed=0)
    write_telemetry(tmp_path / "other", QUICK.long, "dtr", seed=1)
    again, other, first = (read_telemetry(path) for path in (tmp_path / "again", tmp_path / "other", folder))
    assert again.equals(first)
    assert not other["gramian"].equals(first["gramian"])


def test_metrics_that_differ_from_the_rows_are_found(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (run_id,) = add_runs(uri, tasks.LOGGED, QUICK.logged, ["baseline"], seeds=1)
    assert log_as_metrics(uri, run_id) == tasks.measure_logged(uri, rounds=1)["values"]
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=uri).log_metric(run_id, "gramian/one more", 100.0)
    with pytest.raises(AssertionError, match="metrics of gramian add up to"):
        tasks.measure_logged(uri, rounds=1)


def test_peak_of_memory_is_this_process_own():
    code = "from experiments.benchmarks.analysis.tasks import peak_rss_bytes as peak\nprint(peak(), flush=True)\n"
    more = "kept = bytearray(b'x') * 200_000_000\nprint(peak())"
    held = bytearray(b"x") * 400_000_000  # which a child that is started from here must not count
    done = subprocess.run([sys.executable, "-c", code + more], capture_output=True, text=True, timeout=60, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 150_000_000 < len(held)
    assert 190_000_000 < after - before < 250_000_000
