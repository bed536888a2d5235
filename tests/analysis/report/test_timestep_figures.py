"""The report's figure of representations draws CKA between timesteps, block by block, with log-SNR beside t."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.plots.timesteps import plot_timestep_cka
from analysis.report.timestep_figures import representation_figure
from analysis.representation import timestep_cka
from tests.analysis import synthetic
from tests.analysis.measured import representation_rows, run_with
from tests.analysis.synthetic import K

TIMES = [12 + 25 * task for task in range(K)]


def shown(ax):
    return np.ma.filled(ax.images[0].get_array(), np.nan)


def test_blocks_of_a_method_stand_side_by_side(measured_runs, runs):
    report = representation_figure(measured_runs)
    panels = [ax for ax in report.figure.axes if ax.get_title()]
    blocks = list(synthetic.CHANNELS)
    assert [ax.get_title() for ax in panels] == [f"Baseline: {block}" for block in blocks]
    own = [run for run in measured_runs if run.attrs["method"] == "baseline"]
    expected = np.mean([timestep_cka(run).values for run in own], axis=0)
    for ax, values in zip(panels, expected, strict=True):
        np.testing.assert_allclose(shown(ax), values)
    assert len({ax.images[0].get_clim() for ax in panels}) == 1
    assert representation_figure(runs) is None
    assert len([ax for ax in representation_figure(measured_runs, shown_blocks=1).figure.axes if ax.get_title()]) == 1


def test_the_axes_name_timesteps_and_log_snr_and_undefined_cells_stay_empty(tmp_path):
    hsic = np.exp(-np.abs(np.subtract.outer(TIMES, TIMES)) / 80)
    hsic[2] = hsic[:, 2] = 0.0  # a block that hands on the same for all images
    run = run_with(tmp_path, representations=[representation_rows(dict.fromkeys(synthetic.CHANNELS, hsic), TIMES)])
    cka = timestep_cka(run)
    ax = plot_timestep_cka(cka[0], low=0.2, ax=Figure().subplots())
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(t) for t in TIMES]
    top = ax.child_axes[0]
    expected = [f"{value:.1f}" for value in cka["log_snr"].values]
    assert [label.get_text() for label in top.get_xticklabels()] == expected
    assert ax.images[0].get_clim() == (0.2, 1.0)
    assert np.isnan(shown(ax)[2]).all()


def test_the_scale_begins_above_zero_only_where_all_is_alike(tmp_path):
    hsic = 0.9 + 0.1 * np.eye(len(TIMES))
    rows = [representation_rows(dict.fromkeys(synthetic.CHANNELS, hsic), TIMES)]
    run = run_with(tmp_path, representations=rows).assign_attrs(method="baseline")
    report = representation_figure([run])
    assert report.figure.axes[0].images[0].get_clim() == (0.9, 1.0)
    assert "begins above zero" in report.caption
