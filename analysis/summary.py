"""The comparison in one table and a few sentences: who ends lower, who gets there sooner, what the seeds can carry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from analysis.conflict_summary import conflict_sentences
from analysis.convergence import median_arrivals, paired_difference, steps_to_baseline
from analysis.convergence_summary import clock_warning, convergence_sentences
from analysis.frames import VAL_LOSS
from analysis.gramians import same_parts
from analysis.methods import method_name, ordered, reference_method
from analysis.significance import NOISE_NULL
from analysis.uncertainty import FEW_SEEDS, seed_warning
from lightning_modules.tracking.records import RunManifest

NOT_REACHED = "not reached"
_MOST_COLUMNS = 6
"""Methods that a table has room for side by side."""
_FREE_FIELDS = {"method", "seed", "routing"}
"""Manifest entries in which runs of one comparison may differ: what is compared."""


def summary_frame(table: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """One row per method, the reference (the baseline if there is one) first.

    Args:
        table: `frames.runs_frame` of the runs.
        curves: `frames.curves_frame` of them.

    Returns:
        Index method; columns

        - seeds, step (of the last validation; the smallest over runs),
        - val_loss, low_noise, high_noise (mean over runs of the last validation loss overall and in the first and last
          quarter of T; NaN if any run diverged) and each with ``_sd`` (sample standard deviation over runs),
        - conflict_rate (mean over runs), conflict_rate_error (standard error over the probes within these runs:
          conditional on them, not a spread over seeds; NaN if a run has too few of them), conflict_null (0.5),
        - arrived, paired (runs that reached the final loss of the reference with the same seed, and runs that have such
          a partner), steps_to_baseline (text: every seed's steps, "not reached" where censored),
        - difference, difference_low, difference_high (final loss minus the reference's, paired by seed, with its
          95 % interval; NaN for the reference itself).
    """
    reference = reference_method(table["method"])
    reached = steps_to_baseline(curves, VAL_LOSS, reference)
    rows = {}
    for method in ordered(table["method"]):
        own = table[table["method"] == method]
        row: dict[str, object] = {"seeds": own["seed"].nunique(), "step": int(own["step"].min())}
        for name in ("val_loss", "low_noise", "high_noise"):
            row[name] = own[name].mean(skipna=False)
            row[f"{name}_sd"] = own[name].std(ddof=1, skipna=False)
        row["conflict_rate"] = own["conflict_rate"].mean()
        errors = own.loc[own["conflict_rate"].notna(), "conflict_rate_error"]
        row["conflict_rate_error"] = np.sqrt((errors**2).sum(skipna=False)) / len(errors) if len(errors) else np.nan
        row["conflict_null"] = NOISE_NULL
        mine = reached[reached["method"] == method].sort_values("seed")
        row |= {"arrived": int(mine["arrived"].sum()), "paired": len(mine), "steps_to_baseline": _arrival_text(mine)}
        interval = paired_difference(curves, VAL_LOSS, method, reference)[1]
        is_reference = method == reference
        row["difference"] = np.nan if is_reference else interval.estimate
        row["difference_low"] = np.nan if is_reference else interval.low
        row["difference_high"] = np.nan if is_reference else interval.high
        rows[method] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _arrival_text(reached: pd.DataFrame) -> str:
    """Every seed's steps while they are few, else median and share; never hides a run that did not arrive."""
    if reached.empty:
        return "no paired seed"
    if not reached["arrived"].any():
        return NOT_REACHED
    if len(reached) < FEW_SEEDS:
        steps = [f"{row.step:,.0f}" if row.arrived else NOT_REACHED for row in reached.itertuples()]
        return ", ".join(steps)
    row = median_arrivals(reached).iloc[0]
    share = f"{row['arrived']:.0f} of {row['runs']:.0f} runs"
    return f"{row['median']:,.0f} ({share})" if np.isfinite(row["median"]) else f"{NOT_REACHED} ({share})"


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """The table of `summary_frame` as text for people: a column per method, a row per quantity, headings first.

    The other way round with more methods than can stand side by side.
    """
    base = method_name(str(summary.index[0]))
    if len(summary) > _MOST_COLUMNS:
        rows = {method_name(str(method)): _readable_column(row, base) for method, row in summary.iterrows()}
        table = pd.DataFrame.from_dict(rows, orient="index").rename(columns=str.strip)
        return table.rename_axis("").reset_index()
    columns = {"": list(_readable_column(summary.iloc[0], base))}
    for method, row in summary.iterrows():
        columns[method_name(str(method))] = list(_readable_column(row, base).values())
    return pd.DataFrame(columns)


def _readable_column(row: pd.Series, base: str) -> dict[str, str]:
    difference = "–"
    if np.isfinite(row["difference"]):
        difference = f"{row['difference']:+.3g}"
        if np.isfinite(row["difference_low"]):
            difference += f" [{row['difference_low']:+.3g}, {row['difference_high']:+.3g}]"
    rate = "not measured"
    if np.isfinite(row["conflict_rate"]):
        error = row["conflict_rate_error"]
        rate = f"{row['conflict_rate']:.3f}" + (f"\u00a0±\u00a0{error:.3f}" if np.isfinite(error) else "")
    return {
        "Seeds": str(row["seeds"]),
        "Final validation loss": _with_spread(row, "val_loss"),
        "  at low noise (first quarter)": _with_spread(row, "low_noise"),
        "  at high noise (last quarter)": _with_spread(row, "high_noise"),
        f"Difference to {base} [95 %]": difference,
        f"Steps to {base}'s final loss": str(row["steps_to_baseline"]),
        "Conflict rate (noise gives 0.5)": rate,
    }


def _with_spread(row: pd.Series, name: str) -> str:
    if not np.isfinite(row[name]):
        return "diverged"
    # Four significant digits of the mean, and the spread to the same decimal place.
    decimals = max(0, 3 - int(np.floor(np.log10(abs(row[name]))))) if row[name] else 0
    text, spread = f"{row[name]:.{decimals}f}", row[f"{name}_sd"]
    return f"{text}\u00a0±\u00a0{spread:.{decimals}f}" if np.isfinite(spread) else text


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the comparison found, in words.

    Attributes:
        findings: Sentences, one per method and question.
        warnings: What a reader must know before believing them.
    """

    findings: list[str]
    warnings: list[str]


def verdict(runs: Sequence[xr.Dataset], summary: pd.DataFrame, curves: pd.DataFrame) -> Verdict:
    """States for every method how it converges against the reference, and how often its intervals conflict.

    Args:
        runs: What was compared.
        summary: `summary_frame` of it.
        curves: `frames.curves_frame` of it.
    """
    reference = str(summary.index[0])
    # DTR before its control: the last method is the one that the comparison is about.
    others = [str(method) for method in reversed(summary.index[1:])]
    findings = convergence_sentences(curves, reference, others) + conflict_sentences(runs, summary)
    if not others:
        findings.insert(0, f"Only {method_name(reference)} was run: there is nothing to compare it with.")
        return Verdict(findings, comparability(runs))
    pairs = int(summary.loc[others, "paired"].min())
    warnings = [seed_warning(pairs, of=int(summary["seeds"].max())), *comparability(runs), clock_warning(curves)]
    return Verdict(findings, [text for text in warnings if text])


def comparability(runs: Sequence[xr.Dataset]) -> list[str]:
    """What differs between runs beyond method and seed, and so may explain a difference that is put down to them."""
    found = []
    unfinished = [f"{run.attrs['name']} ({run.attrs['status']})" for run in runs if run.attrs["status"] != "FINISHED"]
    if unfinished:
        found.append(f"Not finished: {', '.join(unfinished)}. Their last values are not final.")
    manifests = [_settings(run) for run in runs]
    methods = ordered(manifest["method"] for manifest in manifests)
    differing = _differing(manifests)
    if differing and len(methods) > 1:
        found.append(f"The runs differ in {', '.join(differing)}: a difference between methods may come from that.")
    for method in methods:
        inside = _differing([manifest for manifest in manifests if manifest["method"] == method])
        if inside:
            found.append(
                f"Runs of {method_name(method)} differ in {', '.join(inside)}, not only in their seed: their mean and "
                "spread are over different settings, not over seeds of one."
            )
        routings = [m["routing"] or {} for m in manifests if m["method"] == method]
        shared = set.intersection(*map(set, routings)) - {"seed"}  # older versions did not write all of it
        if len({repr([(key, routing[key]) for key in sorted(shared)]) for routing in routings}) > 1:
            found.append(f"Runs of {method_name(method)} differ in their routing parameters, not only in their seed.")
    if not same_parts([run for run in runs if "gramian" in run], "block"):
        found.append(
            "The runs have different blocks: the figure of conflict by block is left out; all others are of whole "
            "networks."
        )
    partial = {run.attrs["name"]: float(run["coverage"].min()) for run in runs if "coverage" in run}
    if any(share < 1 for share in partial.values()):
        listed = ", ".join(f"{name} {share:.1%}" for name, share in partial.items() if share < 1)
        found.append(f"Gradient conflict was not measured in all parameters, only in this share of them: {listed}.")
    steps = {run.attrs["name"]: int(run["val_step"][-1]) for run in runs if "val_step" in run.coords}
    if len(set(steps.values())) > 1:
        found.append(f"Runs end at different steps ({min(steps.values()):,} to {max(steps.values()):,}).")
    return found


def _settings(run: xr.Dataset) -> dict:
    """The manifest, but for a loss weight that the method's tag names: that is what is compared."""
    manifest = vars(RunManifest.from_json(run.attrs["manifest"]))
    named = manifest["loss_weight"] in manifest["method"].split("+")
    return manifest | ({"loss_weight": "uniform"} if named else {})


def _differing(manifests: list[dict]) -> list[str]:
    return [name for name in manifests[0] if name not in _FREE_FIELDS and len(_values(manifests, name)) > 1]


def _values(manifests: list[dict], name: str) -> set[str]:
    return {repr(manifest[name]) for manifest in manifests}
