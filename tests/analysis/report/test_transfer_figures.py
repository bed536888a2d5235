"""The report's figures about measured transfer draw the statistics that they name, of the runs that they name."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from analysis.affinity_measures import SPECIALISTS, affinities_by_method, measured_affinities
from analysis.report.affinity_figures import agreement_figure
from analysis.report.transfer_figures import look_ahead_figure, measured_figure, measured_film_figure, sharing_figure
from analysis.specialists import negative_transfer_gap, specialist_affinity
from analysis.transfer import first_order_slope, look_ahead_affinity, predicted_look_ahead, transfer_film
from tests.analysis.measured import K, with_losses

SHARED = np.linspace(0.5, 0.1, K)


def of(runs, method):
    return [run for run in runs if run.attrs["method"] == method]


def shown(ax):
    return ax.images[0].get_array().filled(np.nan)


def test_measured_figure_shows_the_measures_of_each_method(measured_runs, runs):
    report = measured_figure(affinities_by_method(measured_runs))
    panels = [ax for ax in report.figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == [
        "Baseline: look-ahead / own",
        "Baseline: fine-tuning / own",
        "Baseline: CKA",
    ]
    found = measured_affinities(of(measured_runs, "baseline"))
    for ax, name in zip(panels, list(found)[2:], strict=True):
        np.testing.assert_array_equal(shown(ax), found[name])
    assert [ax.images[0].get_clim() for ax in panels] == [(-1, 1), (-1, 1), (0, 1)]
    assert measured_figure(affinities_by_method(runs)) is None


def test_film_has_the_checkpoints_of_the_methods_that_were_measured(measured_runs):
    report = measured_film_figure(measured_runs)
    (ax,) = (ax for ax in report.figure.axes if ax.get_title(loc="left"))
    assert ax.get_title(loc="left") == "Baseline"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["40", "100"]
    film = transfer_film(of(measured_runs, "baseline"), relative=True)
    np.testing.assert_array_equal(shown(ax)[:, :K], film[0])
    np.testing.assert_array_equal(shown(ax)[:, K + 1 :], film[1])
    single = [run.isel(look_ahead_step=[1]) for run in of(measured_runs, "baseline")]
    assert measured_film_figure(single) is None


def test_look_ahead_figure_sets_measured_against_predicted(measured_runs, runs):
    report = look_ahead_figure(measured_runs)
    (ax,) = (ax for ax in report.figure.axes if ax.get_title())
    own = of(measured_runs, "baseline")
    points = next(each for each in ax.collections if isinstance(each, PathCollection)).get_offsets()
    first, real = predicted_look_ahead(own).values, look_ahead_affinity(own).values
    np.testing.assert_allclose(points, np.stack([first.ravel(), real.ravel()], 1))
    low, high = ax.get_xlim()
    assert low <= min(first.min(), real.min())
    assert high >= max(first.max(), real.max())
    assert ax.get_ylim() == (low, high)
    slopes = [first_order_slope(run) for run in own]
    assert slopes == pytest.approx([0.9 / 1.1] * len(own))
    assert [text.get_text() for text in ax.texts] == ["slope 0.82 [0.82, 0.82]"]
    assert look_ahead_figure(runs) is None
    unpredicted = [run.assign(look_ahead_predicted=np.nan * run["look_ahead_predicted"]) for run in own]
    assert look_ahead_figure(unpredicted) is None


def specialised(seeds):
    """Shared runs, and specialists that are 20 % worse, but 10 % better in the last interval."""
    ratio = np.where(np.eye(K, dtype=bool), 1.2, 3.0)
    ratio[-1, -1] = 0.9
    shared = [with_losses(SHARED * (1 + seed), seed=seed) for seed in seeds]
    alone = [
        with_losses(SHARED * (1 + seed) * ratio[task] * (1 + 0.01 * seed), seed=seed, task=task)
        for seed in seeds
        for task in range(K)
    ]
    return tuple([run.assign_attrs(method="baseline") for run in each] for each in (shared, alone))


def test_sharing_figure_shows_gaps_seeds_and_reach():
    shared, alone = specialised([0, 1, 2])
    report = sharing_figure(shared, {"baseline": alone})
    gaps, reach = (ax for ax in report.figure.axes if ax.get_title())
    expected = negative_transfer_gap(shared, alone)
    container = gaps.containers[0]
    np.testing.assert_allclose(container.lines[0].get_ydata(), expected["gap"])
    ends = [segment[:, 1] for segment in container.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, np.stack([expected["low"], expected["high"]], 1))
    dots = next(each for each in gaps.collections if isinstance(each, PathCollection)).get_offsets()
    np.testing.assert_allclose(dots[:, 1], expected["by_seed"].values.ravel())
    np.testing.assert_array_equal(shown(reach), specialist_affinity(shared, alone))
    last = str(expected["interval"].values[-1]).removeprefix("t")
    assert f"harmed at t {last}" in report.caption
    assert "Baseline (3 seeds)" in report.caption
    assert sharing_figure(shared, {}) is None
    assert "(false discovery rate 5 % over the intervals)" in report.caption
    few = sharing_figure(shared[:2], {"baseline": alone[: 2 * K]})
    assert "with 2 of the seeds paired, no gap can be told from chance" in few.caption
    assert "harmed at" not in few.caption


def test_specialists_take_part_in_the_agreement(measured_runs):
    own = of(measured_runs, "baseline")
    _, alone = specialised([0, 1])
    assert SPECIALISTS in measured_affinities(own, specialists=alone)
    report = agreement_figure(affinities_by_method(measured_runs, {"baseline": alone}))
    panel = next(ax for ax in report.figure.axes if ax.get_title() == "Baseline")
    assert SPECIALISTS in [label.get_text() for label in panel.get_xticklabels()]
