"""What the gradient probes found, in sentences: how often intervals conflict, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from analysis.gramians import STEP, pool_runs
from analysis.jackknife import MIN_UNITS
from analysis.methods import method_name
from analysis.significance import FALSE_DISCOVERY_RATE, NOISE_NULL, conflict_rate, probe_rate


def conflict_sentences(runs: Sequence[xr.Dataset], summary: pd.DataFrame) -> list[str]:
    """One or two sentences on every method with gradient probes.

    Args:
        runs: What was compared.
        summary: `summary.summary_frame` of it.
    """
    sentences = []
    for method, row in summary.iterrows():
        measured = [run for run in runs if run.attrs["method"] == method and "gramian" in run]
        if not measured or not np.isfinite(row["conflict_rate"]):
            continue
        rate, error = row["conflict_rate"], row["conflict_rate_error"]
        text = f"Conflict rate of {method_name(str(method))}: {rate:.3f}"
        if not np.isfinite(error):
            sentences.append(f"{text} ({_why_no_error(measured)}).")
            continue
        pooled = pool_runs(measured)
        text += f" ± {error:.3f} ({_other_runs(measured, pooled)})"
        if abs(rate - NOISE_NULL) <= 2 * error:
            text += f", not distinguishable from the {NOISE_NULL} that pure noise gives."
        else:
            side = "below" if rate < NOISE_NULL else "above"
            text += f", {side} the {NOISE_NULL} that pure noise gives."
        sentences.append(f"{text} {_resolved_pairs(conflict_rate(*pooled))}")
    return sentences


def _other_runs(measured: Sequence[xr.Dataset], pooled: tuple[xr.DataArray, xr.DataArray]) -> str:
    if len(measured) == 1:
        return "over the probes of one run, which says nothing about other seeds"
    error = float(probe_rate(*pooled, errors="runs")["standard_error"])
    return f"over probes; ± {error:.3f} over {len(measured)} runs" if error > 0 else "over probes; the same in all runs"


def _why_no_error(measured: Sequence[xr.Dataset]) -> str:
    if min(run.sizes[STEP] for run in measured) < MIN_UNITS:
        return "too few probes for an error"
    return "the same in every probe of a run, which gives no error"


def _resolved_pairs(found: xr.Dataset) -> str:
    """Which pairs are more than noise, counted over all probes of the method."""
    pairs = int(found["pairs"])
    against, together = (round(float(found[name]) * pairs) for name in ("conflicting", "agreeing"))
    return (
        f"Of {pairs} pairs of intervals {against} conflict and {together} agree significantly over all its probes, "
        f"{pairs - against - together} are not resolved (false discovery rate {100 * FALSE_DISCOVERY_RATE:.0f} %)."
    )
