"""The measurements as rows, as a table, and as sentences on the targets."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from experiments.benchmarks.gramian.comparison import METHODS, Comparison, Failure
from experiments.benchmarks.gramian.measure import Case

Row = dict[str, Any]

SLOWDOWN_TARGETS = {"DiT": 1.10, "U-Net": 1.25, "DiT-B/2": 1.15}
"""The whole training step with the Gramian of every layer over the plain step, at K = 8: on the CPU; for DiT-B/2 on a
GPU, against the compiled plain step in bfloat16 (``--device cuda --compile --precision bf16``)."""
MEMORY_TARGETS = {"DiT": 1.15}
"""Its peak memory over the plain step's, at K = 8."""
SPEEDUP_TARGET = 5.0
"""K retained backward passes over ours, at K = 8."""
TARGET_K = 8


def rows_of(comparison: Comparison) -> list[Row]:
    """One row per method and K; numbers are None where a method could not be measured, and the note says why."""
    plain_peak = comparison.cases[0].peak_bytes
    rows = [_row(comparison, case, plain_peak) for case in comparison.cases]
    rows += [_failed_row(comparison, failure) for failure in comparison.failures]
    order = ["plain", *METHODS]
    return sorted(rows, key=lambda row: (row["K"], order.index(row["method"])))


def _common(comparison: Comparison, num_groups: int, method: str) -> Row:
    workload = comparison.workload
    return {"model": workload.model, "width": workload.width, "K": num_groups, "method": method}


def _row(comparison: Comparison, case: Case, plain_peak: int) -> Row:
    plain = [seconds / ratio for seconds, ratio in zip(case.seconds, case.ratios, strict=True)]
    return {
        **_common(comparison, case.batch.num_groups, case.method.name),
        "ratio_to_plain": statistics.median(case.ratios),
        "peak_memory_ratio": case.peak_bytes / plain_peak,
        "quartiles": [float(value) for value in np.quantile(case.ratios, [0.25, 0.75])],
        "rounds": len(case.ratios),
        "milliseconds": 1e3 * statistics.median(case.seconds),
        "plain_milliseconds": 1e3 * statistics.median(plain),
        "peak_bytes": case.peak_bytes,
        "gramian_error": case.gramian_error,
        "gradient_error": case.gradient_error,
        "scope": None if case.gramian_error is None else case.method.scope,
        "coverage": case.method.coverage,
        "parameters": sum(parameter.numel() for parameter in case.method.parameters),
        "batch": len(case.batch.t),
        "note": case.note,
    }


def _failed_row(comparison: Comparison, failure: Failure) -> Row:
    return {
        **_common(comparison, failure.num_groups, failure.name),
        "ratio_to_plain": None,
        "peak_memory_ratio": None,
        "note": failure.note,
    }


def table(rows: list[Row]) -> str:
    """The rows as a table of fixed width, with the notes of what failed below it."""
    lines = [
        f"{'model':8} {'width':>5} {'K':>3} {'method':12} {'step / plain':>12} {'quartiles':>13} {'rounds':>6} "
        f"{'ms':>8} {'peak / plain':>12} {'error':>8} Gramian of"
    ]
    for row in rows:
        start = f"{row['model']:8} {row['width']:5} {row['K']:3} {row['method']:12}"
        if row["ratio_to_plain"] is None:
            lines.append(f"{start} {'-':>12}  {row['note']}")
            continue
        low, high = row["quartiles"]
        error = "-" if row["gramian_error"] is None else f"{row['gramian_error']:.0e}"
        scope = {"layers": "every layer", "total": "the model", None: "-"}[row["scope"]]
        lines.append(
            f"{start} {row['ratio_to_plain']:12.3f} {low:6.3f}-{high:.3f} {row['rounds']:6} {row['milliseconds']:8.1f} "
            f"{row['peak_memory_ratio']:12.3f} {error:>8} {scope}"
        )
    return "\n".join(lines)


def verdicts(rows: list[Row]) -> list[str]:
    """One sentence per target and model that was measured at K = 8."""
    at_target = {(row["model"], row["width"], row["method"]): row for row in rows if row["K"] == TARGET_K}
    sentences = []
    for (model, width, method), row in at_target.items():
        if method != "ours":
            continue
        name = f"{model} of width {width}, K = {TARGET_K}:"
        if row["ratio_to_plain"] is None:
            sentences.append(f"{name} ours could not be measured: {row['note']}")
            continue
        if model in SLOWDOWN_TARGETS:
            slowdown, most = row["ratio_to_plain"], SLOWDOWN_TARGETS[model]
            sentences.append(
                f"{name} the whole step takes {slowdown:.3f} times the plain step (target at most {most:.2f}): "
                f"{_verdict(slowdown <= most)}"
            )
        retained = at_target.get((model, width, "retained"), {}).get("ratio_to_plain")
        if retained is not None:
            speedup = retained / row["ratio_to_plain"]
            sentences.append(
                f"{name} {speedup:.2f} times faster than K retained backward passes (target at least "
                f"{SPEEDUP_TARGET:.0f}): {_verdict(speedup >= SPEEDUP_TARGET)}"
            )
        if model in MEMORY_TARGETS:
            memory, most = row["peak_memory_ratio"], MEMORY_TARGETS[model]
            sentences.append(
                f"{name} peak memory is {memory:.3f} times the plain step's (target at most {most:.2f}): "
                f"{_verdict(memory <= most)}"
            )
    return sentences


def _verdict(met: bool) -> str:
    return "met" if met else "missed"
