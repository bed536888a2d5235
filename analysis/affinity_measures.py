"""Every affinity that the runs of one method have data for, on scales on which they can be compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import xarray as xr

from analysis.affinity import gradient_affinity, mask_overlap, mean_over_runs, tag_affinity
from analysis.representation import representation_affinity
from analysis.transfer import fine_tuning_affinity, look_ahead_affinity, relative_to_own

GRADIENT, TAG, LOOK_AHEAD = "gradient cosine", "first-order TAG", "look-ahead"
FINE_TUNING, REPRESENTATION, MASKS = "fine-tuning", "representation (CKA)", "mask overlap"
NAMES = (GRADIENT, TAG, LOOK_AHEAD, FINE_TUNING, REPRESENTATION, MASKS)
"""Of the affinities, in tables and figures."""

_BY_RUN: dict[str, tuple[str, Callable[[xr.Dataset], xr.DataArray]]] = {
    LOOK_AHEAD: ("look_ahead_change", lambda run: relative_to_own(look_ahead_affinity(run))),
    FINE_TUNING: ("fine_tuning_change", lambda run: relative_to_own(fine_tuning_affinity(run))),
    REPRESENTATION: ("representation_hsic", representation_affinity),
}
"""Measures taken run by run, with the variable that a run must have."""


def measured_affinities(runs: Sequence[xr.Dataset], names: Collection[str] = NAMES) -> dict[str, xr.DataArray]:
    """The affinities of these runs, averaged over them.

    Gradient affinities pool the probes of all runs, and are corrected for noise if the tasks were measured in halves.
    Others are means over the runs that have them, with errors over runs; of one run it keeps its own errors. Affinities
    that are shares of a task's loss are relative to what the task does for itself (`transfer.relative_to_own`), so that
    columns have one scale.

    Args:
        runs: Of one method, over the same intervals.
        names: Which affinities.

    Returns:
        Name -> (task, other_task), of those that some run has data for, in the order of `NAMES`.
    """
    found: dict[str, xr.DataArray] = {}
    probed = [run for run in runs if "gramian" in run]
    halved = all(run.sizes["half"] > 1 for run in probed)
    if probed and GRADIENT in names:
        found[GRADIENT] = gradient_affinity(probed, corrected=halved)
    if probed and halved and TAG in names:  # the rate is a factor of all cells, which the relative form does without
        found[TAG] = relative_to_own(tag_affinity(probed, 1.0))
    for name, (variable, measure) in _BY_RUN.items():
        each = [measure(run) for run in runs if variable in run] if name in names else []
        if each:
            found[name] = each[0] if len(each) == 1 else mean_over_runs(each)
    routed = next((run for run in runs if "mask" in run), None)
    if routed is not None and MASKS in names:
        found[MASKS] = mask_overlap(routed)
    return found
