"""The report's figures about affinity and clusters draw the statistics that they name, of the runs that they name."""

from __future__ import annotations

import re

import numpy as np
import xarray as xr

from analysis import affinity, affinity_measures
from analysis.affinity_measures import NAMES, affinities_by_method, measured_affinities
from analysis.agreement import agreement_table, distance_matrix
from analysis.cluster_count import silhouette_count
from analysis.clustering import affinity_units
from analysis.report.affinity_figures import affinity_figure, affinity_film_figure, agreement_figure
from analysis.report.cluster_figures import clusters_figure
from analysis.representation import representation_affinity
from analysis.transfer import fine_tuning_affinity, look_ahead_affinity
from tests.analysis import synthetic
from tests.analysis.synthetic import K


def of(runs, method):
    return [run for run in runs if run.attrs["method"] == method]


def shown(ax):
    return ax.images[0].get_array().filled(np.nan)


def test_all_affinities_of_a_method_are_found(measured_runs):
    own = of(measured_runs, "baseline")
    found = measured_affinities(own)
    without = {affinity_measures.MASKS, affinity_measures.SPECIALISTS}
    assert list(found) == [name for name in NAMES if name not in without]
    np.testing.assert_array_equal(found[affinity_measures.GRADIENT], affinity.gradient_affinity(own))
    xr.testing.assert_identical(found[affinity_measures.LOOK_AHEAD], look_ahead_affinity(own, relative=True))
    xr.testing.assert_identical(found[affinity_measures.FINE_TUNING], fine_tuning_affinity(own, relative=True))
    each = [representation_affinity(run) for run in own]
    np.testing.assert_allclose(found[affinity_measures.REPRESENTATION], np.mean(each, axis=0))
    assert found[affinity_measures.REPRESENTATION].attrs["units"] == len(own)
    tag = affinity.tag_affinity(own, 0.01).values
    np.testing.assert_allclose(found[affinity_measures.TAG], tag / np.diag(tag), rtol=1e-6)
    routed = measured_affinities(of(measured_runs, "dtr"), [affinity_measures.MASKS])
    assert list(routed) == [affinity_measures.MASKS]
    alone = measured_affinities(own[:1], [affinity_measures.REPRESENTATION])
    xr.testing.assert_identical(alone[affinity_measures.REPRESENTATION], each[0])


def test_runs_without_halves_have_a_plain_gradient_cosine_only(runs):
    whole = [run.isel(half=[0], other_half=[0]) for run in of(runs, "baseline")]
    found = measured_affinities(whole)
    assert list(found) == [affinity_measures.GRADIENT]
    assert not found[affinity_measures.GRADIENT].attrs["corrected"]
    assert clusters_figure(whole) is None
    assert agreement_figure({"baseline": found}) is None
    film = affinity_film_figure(whole)
    assert "noise-corrected" not in film.caption


def test_affinity_figure_compares_gradients_with_masks(runs):
    report = affinity_figure(runs)
    gradient, overlap = report.figure.axes[0], report.figure.axes[1]
    np.testing.assert_array_equal(shown(gradient), affinity.gradient_affinity(of(runs, "baseline")))
    np.testing.assert_array_equal(shown(overlap), affinity.mask_overlap(of(runs, "dtr")[0]))
    near = [distance_matrix(runs[0]), distance_matrix(runs[0], "log_snr")]
    table = agreement_table(
        {
            "gradient": affinity.gradient_affinity(of(runs, "baseline")),
            "mask": affinity.mask_overlap(of(runs, "dtr")[0]),
        },
        given=near,
    ).iloc[0]
    assert f"over 28 pairs is {table['correlation']:.2f}" in report.caption
    assert (
        f"the correlation is {table['partial']:.2f} (p = {table['shift_p_value']:.3g} from shifting" in report.caption
    )
    assert "cannot fall below 0.0625" in report.caption
    assert affinity_figure(of(runs, "baseline")) is None


def test_film_figure_has_a_row_for_each_method_on_one_scale(runs):
    report = affinity_film_figure(runs)
    rows = [ax for ax in report.figure.axes if ax.images and ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in rows] == ["Baseline", "Random routing", "DTR"]
    assert len({ax.images[0].get_clim() for ax in rows}) == 1
    windows = 3 * len(synthetic.STEPS) // 8
    film = affinity.gradient_affinity_film(of(runs, "dtr"), windows=windows)
    np.testing.assert_array_equal(shown(rows[2])[:, (windows - 1) * (K + 1) :], film[-1])
    assert f"in {windows} consecutive parts" in report.caption
    few = [run.isel(gradient_step=slice(0, 2)) for run in runs]
    assert affinity_film_figure(few) is None
    assert affinity_film_figure([run.drop_vars("gramian") for run in runs]) is None


def test_agreement_figure_has_the_same_rows_for_all_methods(measured_runs):
    report = agreement_figure(affinities_by_method(measured_runs))
    panels = [ax for ax in report.figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["Baseline", "Random routing", "DTR"]
    names = [name for name in NAMES if name != affinity_measures.SPECIALISTS]
    names += ["closeness in t", "closeness in log-SNR"]
    for ax in panels:
        assert [label.get_text() for label in ax.get_xticklabels()] == names
    first = shown(panels[0])
    found = measured_affinities(of(measured_runs, "baseline"))
    near = {"closeness in t": distance_matrix(found["look-ahead"])}
    near["closeness in log-SNR"] = distance_matrix(found["look-ahead"], "log_snr")
    table = agreement_table(found, beside=near, given=list(near.values()), permutations=99)
    for _, row in table.iterrows():
        at = names.index(row["first"]), names.index(row["second"])
        np.testing.assert_allclose([first[at], first[at[::-1]]], [row["correlation"], row["partial"]])
    masks = names.index(affinity_measures.MASKS)
    assert np.isnan(first[masks]).all()
    assert np.isfinite(shown(panels[2])[masks, 0])


def test_clusters_figure_shows_the_groups(runs):
    report = clusters_figure(runs)
    matrix, bars, silhouette, prediction = (ax for ax in report.figure.axes if ax.get_xlabel())
    frames = [patch for patch in matrix.patches if not patch.get_fill()]
    assert [frame.get_width() for frame in frames] == [K / 2, K / 2]
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert names == [
        "measured intervals",
        "distance in t",
        "distance in log-SNR",
        "gradients, Baseline",
        "gradients, Random routing",
        "gradients, DTR",
    ]
    by_row = {}
    for bar in bars.patches:
        by_row.setdefault(names[round(bar.get_y() + bar.get_height() / 2)], []).append(bar.get_width())
    half = synthetic.T // 2
    assert by_row["measured intervals"] == [synthetic.T // K] * K
    assert all(widths == [half, half] for name, widths in by_row.items() if name != "measured intervals")
    count = silhouette_count(affinity_units(affinity.gradient_affinity(of(runs, "baseline"))))
    line = next(line for line in silhouette.lines if line.get_label() == "Baseline")
    np.testing.assert_allclose(line.get_ydata(), count.scores["value"])
    assert count.said in report.caption
    assert re.search(r"2 clusters of the gradient affinity predict", report.caption)
    assert prediction.get_ylabel() == "squared error of prediction"


def test_clusters_figure_does_without_prediction_and_without_log_snr(runs):
    few = [run.isel(gradient_step=slice(0, 5)) for run in runs]  # 15 probes of a method, two parts of 8 need 16
    for run in few:
        manifest = synthetic.manifest(run.attrs["method"], run.attrs["seed"])
        manifest.log_snr[-1] = -np.inf
        run.attrs["manifest"] = manifest.to_json()
    report = clusters_figure(few)
    drawn = [ax for ax in report.figure.axes if ax.get_xlabel()]
    assert len(drawn) == 3
    assert "distance in log-SNR" not in [label.get_text() for label in drawn[1].get_yticklabels()]
    assert "squared error" not in report.caption
    assert report.png[:4] == b"\x89PNG"
    noise = [run.assign(gramian=run["gramian"] * np.nan) for run in few]
    assert clusters_figure(noise) is None
