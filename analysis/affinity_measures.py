"""Every affinity that the runs of one method have data for, on scales on which they can be compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import xarray as xr

from analysis.affinity import gradient_affinity, mask_overlap, mean_over_runs, tag_affinity
from analysis.forked import forked_calls
from analysis.grouping import group_by_method
from analysis.representation import representation_affinity
from analysis.specialists import specialist_reach
from analysis.transfer import fine_tuning_affinity, look_ahead_affinity

GRADIENT, TAG, LOOK_AHEAD = "gradient cosine", "first-order TAG", "look-ahead"
FINE_TUNING, SPECIALISTS = "fine-tuning", "specialists"
REPRESENTATION, MASKS = "representation (CKA)", "mask overlap"
NAMES = (GRADIENT, TAG, LOOK_AHEAD, FINE_TUNING, SPECIALISTS, REPRESENTATION, MASKS)
"""Of the affinities, in tables and figures."""

_BY_RUNS: dict[str, tuple[str, Callable[[Sequence[xr.Dataset]], xr.DataArray]]] = {
    LOOK_AHEAD: ("look_ahead_change", functools.partial(look_ahead_affinity, relative=True)),
    FINE_TUNING: ("fine_tuning_change", functools.partial(fine_tuning_affinity, relative=True)),
}
"""Measures taken of several runs, with the variable that a run must have."""


def affinities_by_method(
    runs: Sequence[xr.Dataset], specialists: Mapping[str, Sequence[xr.Dataset]] | None = None
) -> dict[str, dict[str, xr.DataArray]]:
    """`measured_affinities` of every method, side by side.

    Args:
        runs: Of any methods, over the same intervals.
        specialists: By method, as of `specialists.usable_specialists`.
    """
    alone = specialists or {}
    by_method = group_by_method(runs)
    found = forked_calls(
        [
            functools.partial(measured_affinities, own, specialists=alone.get(method, ()))
            for method, own in by_method.items()
        ]
    )
    return dict(zip(by_method, found, strict=True))


def measured_affinities(
    runs: Sequence[xr.Dataset], names: Collection[str] = NAMES, *, specialists: Sequence[xr.Dataset] = ()
) -> dict[str, xr.DataArray]:
    """The affinities of these runs, averaged over them.

    Gradient affinities pool the probes of all runs, and are corrected for noise if the tasks were measured in halves.
    Others are means over the runs that have them, with errors over runs; of one run it keeps its own errors. Affinities
    that are shares of a task's loss are relative to what the task does for itself, so that columns have one scale.

    Args:
        runs: Of one method, over the same intervals.
        names: Which affinities.
        specialists: Of the same method, if some were trained, as of `specialists.usable_specialists`.

    Returns:
        Name -> (task, other_task), of those that some run has data for, in the order of `NAMES`.
    """
    found: dict[str, xr.DataArray] = {}
    probed = [run for run in runs if "gramian" in run]
    halved = all(run.sizes["half"] > 1 for run in probed)
    if probed and GRADIENT in names:
        found[GRADIENT] = gradient_affinity(probed, corrected=halved)
    if probed and halved and TAG in names:  # the rate is a factor of all cells, which the relative form does without
        found[TAG] = tag_affinity(probed, 1.0, relative=True)
    for name, (variable, measure) in _BY_RUNS.items():
        having = [run for run in runs if variable in run]
        if having and name in names:
            found[name] = measure(having)
    if specialists and SPECIALISTS in names:
        found[SPECIALISTS] = specialist_reach(specialists)
    compared = [run for run in runs if "representation_hsic" in run]
    if compared and REPRESENTATION in names:
        each = [representation_affinity(run) for run in compared]
        found[REPRESENTATION] = each[0] if len(each) == 1 else mean_over_runs(each)
    routed = next((run for run in runs if "mask" in run), None)
    if routed is not None and MASKS in names:
        found[MASKS] = mask_overlap(routed)
    return found
