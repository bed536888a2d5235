"""How fast, and in how much memory, telemetry is read and reduced.

``python -m experiments.benchmarks.analysis [--json]`` generates telemetry through the real writer's code, in shards of
the sizes it makes, and measures

- *load_seconds*, *peak_rss_gb*: one long run, loaded and reduced to curves, cosines with their errors over the network
  and for each layer, conflict rates, z-scores, noise scales and the use of channels;
- *compare_100_runs_seconds*: ``dtr-lab compare`` of 100 runs such as the demo's, `dtr-lab affinity` included, with all
  figures and the page;
- *compare_100_larger_runs_seconds*: of 100 runs of a DiT-S/4, 20,000 steps each, 30 times as many numbers;
- *report_mb*: the largest of these pages;
- *speedup_over_metrics*: the same numbers read back from MLflow as metrics, one key for each, over Parquet.

Every round of these is a process of its own, on files that the operating system has in its memory. Imports are not
counted, and reported apart. Takes about ten minutes, and five gigabytes of the folder for temporary files (TMPDIR).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from experiments.benchmarks.analysis.report import Result, summarise, table
from experiments.benchmarks.analysis.stores import add_runs, log_as_metrics
from experiments.benchmarks.analysis.tasks import COMPARED, LARGER, LOGGED, LONG, TASKS
from experiments.benchmarks.analysis.workloads import FULL, METHODS, QUICK, Plan


def main(given: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.analysis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="measure only these")
    parser.add_argument("--quick", action="store_true", help="small telemetry and one round: a test that it runs")
    options = parser.parse_args(given)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    plan, rounds = (QUICK, 1) if options.quick else (FULL, options.rounds)
    with tempfile.TemporaryDirectory(prefix="dtr-lab-benchmark-") as folder:
        result = summarise(plan, _measure_all(Path(folder), plan, options.tasks, rounds))
    print(json.dumps(result) if options.json else table(result))


def _measure_all(folder: Path, plan: Plan, tasks: Sequence[str], rounds: int) -> dict[str, Sequence[Result]]:
    uri = f"sqlite:///{(folder / 'mlflow.db').as_posix()}"
    results: dict[str, Sequence[Result]] = {}
    for task in tasks:
        _say(f"generating telemetry: {task}")
        _generate(uri, task, plan)
        _say(f"measuring: {task}")
        # The paired rounds of the last one share a process, so that both sides are warm.
        processes = [[rounds]] if task == LOGGED else [[] for _ in range(rounds)]
        results[task] = [_in_own_process(task, uri, numbers) for numbers in processes]
    return results


def _generate(uri: str, task: str, plan: Plan) -> None:
    if task == LONG:
        add_runs(uri, LONG, plan.long, ["dtr"], seeds=1)
    elif task in (COMPARED, LARGER):
        add_runs(uri, task, plan.compared if task == COMPARED else plan.larger, METHODS, plan.seeds)
    else:
        (run_id,) = add_runs(uri, LOGGED, plan.logged, ["baseline"], seeds=1)
        log_as_metrics(uri, run_id)


def _in_own_process(task: str, uri: str, numbers: Sequence[int]) -> Result:
    command = [sys.executable, "-m", "experiments.benchmarks.analysis.tasks", task, uri, *map(str, numbers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
