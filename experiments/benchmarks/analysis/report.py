"""The measurements as one object, and as a table."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.benchmarks.analysis.tasks import COMPARED, LARGER, LOGGED, LONG
from experiments.benchmarks.analysis.workloads import METHODS, Plan

Result = dict[str, Any]

TARGETS = {"load_seconds": 10.0, "peak_rss_gb": 1.0, "compare_100_runs_seconds": 20.0, "report_mb": 5.0}
"""At most, on two cores."""


def summarise(plan: Plan, rounds: dict[str, Sequence[Result]]) -> Result:
    """Medians over rounds (of the peak of memory, the largest), and all that they depend on.

    Args:
        plan: What was generated.
        rounds: The results of each task's rounds; tasks that were not measured are absent, and their numbers None.
    """
    long, compared, larger, logged = (rounds.get(task, []) for task in (LONG, COMPARED, LARGER, LOGGED))
    result: Result = {
        "load_seconds": _median(long, "seconds"),
        "peak_rss_gb": max((each["peak_rss_gb"] for each in long), default=None),
        "compare_100_runs_seconds": _median(compared, "seconds"),
        "speedup_over_metrics": None,
        "compare_100_larger_runs_seconds": _median(larger, "seconds"),
        "report_mb": max((each["report_mb"] for each in (*compared, *larger)), default=None),
    }
    if logged:
        metrics, parquet = (statistics.median(logged[0][way]) for way in ("metrics", "parquet"))
        result["speedup_over_metrics"] = metrics / parquet
    result["targets_met"] = {name: result[name] <= most for name, most in TARGETS.items() if result[name] is not None}
    result["import_seconds"] = {
        task: _median(rounds[task], "import_seconds") for task in (LONG, COMPARED, LARGER) if task in rounds
    }
    if long:
        result["load_parts"] = {
            part: statistics.median(each["parts"][part] for each in long) for part in long[0]["parts"]
        }
    result["sizes"] = {
        LONG: plan.long.facts(),
        COMPARED: {"runs": len(METHODS) * plan.seeds, "methods": len(METHODS), **plan.compared.facts()},
        LARGER: {"runs": len(METHODS) * plan.seeds, "methods": len(METHODS), **plan.larger.facts()},
        LOGGED: plan.logged.facts() | ({name: logged[0][name] for name in ("keys", "values")} if logged else {}),
    }
    result["rounds"] = dict(rounds)
    result["machine"] = {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    return result


def _median(rounds: Sequence[Result], name: str) -> float | None:
    return statistics.median(each[name] for each in rounds) if rounds else None


def table(result: Result) -> str:
    """The result for people."""
    long, compared, larger, logged = (result["sizes"][task] for task in (LONG, COMPARED, LARGER, LOGGED))
    lines = [
        f"One run of {long['steps']:,} steps: {long['sample_losses']:,} sample losses in {long['loss_windows']:,} "
        f"windows of {long['timesteps']:,} timesteps,",
        f"{long['gradient_probes']:,} probes of {long['layers']} layers x {long['groups']} x {long['groups']}, "
        f"{long['activation_probes']} of {long['blocks']} blocks x {long['channels']:,} channels; "
        f"{long['shards']:,} shards a table:",
        _line("load and reduce", result, "load_seconds", "s"),
        *(f"    {part:28} {seconds:8.2f} s" for part, seconds in result.get("load_parts", {}).items()),
        _line("peak memory", result, "peak_rss_gb", "GB"),
        *_compared(compared, result, "compare_100_runs_seconds"),
        *_compared(larger, result, "compare_100_larger_runs_seconds"),
        _line("largest report", result, "report_mb", "MB"),
        *(f"    {'imports, not counted: ' + task:28} {each:8.2f} s" for task, each in result["import_seconds"].items()),
    ]
    if result["speedup_over_metrics"] is not None:
        lines += [
            f"{logged['values']:,} numbers, as {logged['keys']:,} MLflow metrics or as Parquet:",
            _line("times faster than metrics", result, "speedup_over_metrics", ""),
        ]
    return "\n".join(lines)


def _compared(size: Result, result: Result, name: str) -> list[str]:
    return [
        f"{size['runs']} runs of {size['steps']:,} steps, {size['gradient_probes']:,} probes of {size['layers']} "
        f"layers, {size['blocks']} blocks x {size['channels']} channels; {size['shards']:,} shards a table:",
        _line("compare", result, name, "s"),
    ]


def _line(label: str, result: Result, name: str, unit: str) -> str:
    if result[name] is None:
        return f"  {label:30} not measured"
    text = f"  {label:30} {result[name]:8.2f} {unit}"
    if name in TARGETS:
        text += f" (target at most {TARGETS[name]:g}): {'met' if result['targets_met'][name] else 'missed'}"
    return text
