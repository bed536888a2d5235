"""What a report does with more methods than a figure can hold: which ones it draws, and a word on the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import xarray as xr

from analysis.convergence import paired_difference
from analysis.frames import VAL_LOSS
from analysis.methods import method_name, ordered, reference_method, split_method
from analysis.significance import FALSE_DISCOVERY_RATE, q_values
from analysis.summary import Verdict, comparability, verdict
from analysis.uncertainty import ENOUGH_TO_CLAIM, mean_p_value

MOST_DRAWN = 8
"""Methods whose colours, dots and panels can be told apart in one figure."""


def drawn_methods(methods: Iterable[str]) -> list[str]:
    """The methods that figures show: all while they are few, else one for each routing, or the first ones.

    Of a grid of routings and optimisations these are the routings without an optimisation of their own; where there is
    only one of those, the first `MOST_DRAWN` methods in the order of `methods.ordered`.
    """
    every = ordered(methods)
    if len(every) <= MOST_DRAWN:
        return every
    plain = [method for method in every if not split_method(method).optimisation]
    return (plain if len(plain) > 1 else every)[:MOST_DRAWN]


def verdict_of_many(runs: Sequence[xr.Dataset], summary: pd.DataFrame, curves: pd.DataFrame) -> Verdict:
    """`summary.verdict`; with more methods than are drawn, that of those, and one sentence on the final loss of all.

    Args:
        runs: What was compared.
        summary: `summary.summary_frame` of it.
        curves: `frames.curves_frame` of it.
    """
    drawn = drawn_methods(summary.index)
    if len(drawn) == len(summary):
        return verdict(runs, summary, curves)
    kept = [run for run in runs if run.attrs["method"] in drawn]
    said = verdict(kept, summary.loc[drawn], curves[curves["method"].isin(drawn)])
    names = ", ".join(method_name(method) for method in drawn)
    said.findings.insert(0, _all_methods_sentence(summary, curves))
    said.warnings.append(
        f"{len(summary)} methods are more than a figure holds: sentences and figures below are about {names}. The "
        "table has all; choose others with --runs."
    )
    said.warnings.extend(text for text in comparability(runs) if text not in said.warnings)
    return said


def _all_methods_sentence(summary: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Which of all methods end lower or higher than the reference, as far as that can be told from chance."""
    reference = reference_method(summary.index)
    others = [method for method in ordered(summary.index) if method != reference]
    found = {method: paired_difference(curves, VAL_LOSS, method, reference) for method in others}
    tested = {
        method: mean_p_value(difference.to_numpy())
        for method, (difference, _) in found.items()
        if len(difference) >= ENOUGH_TO_CLAIM
    }
    significant = q_values(pd.Series(tested, dtype=float)) <= FALSE_DISCOVERY_RATE
    sides: dict[str, list[str]] = {"lower": [], "higher": []}
    for method in significant.index[significant]:
        sides["lower" if found[method][1].estimate < 0 else "higher"].append(method_name(method))
    parts = [f"{len(names)} end {side}" + f" ({', '.join(names)})" * bool(names) for side, names in sides.items()]
    return (
        f"Of {len(others)} methods compared with {method_name(reference)} in final validation loss, paired by seed, "
        f"{' and '.join(parts)}; {len(others) - int(significant.sum())} are not resolved (false discovery rate "
        f"{100 * FALSE_DISCOVERY_RATE:.0f} % over all of them)."
    )
