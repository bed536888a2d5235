import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure

from analysis import routing_budget
from analysis.plots.channel_shares import (
    plot_block_task_shares,
    plot_routing_budget,
    plot_specialisation,
    plot_usage_by_block,
)
from analysis.plots.channels import plot_channel_frequency, plot_channel_usage, plot_mask_use, plot_task_shares
from analysis.plots.style import method_colour
from tests.analysis.synthetic import K

mpl.use("Agg")


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.fixture
def tasks(runs):
    return {name: coord for name, coord in runs[0].coords.items() if coord.dims == ("task",)}


def test_unused_channels_have_no_colour_and_absent_ones_no_place(runs, ax):
    energy = runs[3].activation_mean_square.isel(activation_step=-1).sel(block="blocks.0", site="input")
    assert plot_channel_usage((energy / energy.mean("channel")).pad(channel=(0, 4)), ax=ax) is ax
    shown = ax.images[0].get_array()
    assert shown.shape == (K, 32)
    assert shown.mask.sum() == (energy == 0).sum() > 0


def test_the_outline_is_around_what_is_allowed(ax):
    energy = xr.DataArray(np.ones((2, 4)), dims=("task", "channel"), coords={"interval": ("task", ["t0-1", "t2-3"])})
    allowed = xr.DataArray([[0, 1, 1, 1], [0, 0, 1, 1]], dims=("task", "channel")).astype(bool)
    plot_channel_usage(energy, allowed=allowed.pad(channel=(0, 2), constant_values=False), ax=ax)
    drawn = {tuple(map(tuple, segment)) for segment in ax.collections[0].get_segments()}
    upright = {((0.5, -0.5), (0.5, 0.5)), ((1.5, 0.5), (1.5, 1.5))}
    assert drawn == upright | {((0.5, 0.5), (1.5, 0.5))}
    plot_channel_usage(energy, allowed=xr.ones_like(allowed), ax=(open_ax := Figure().subplots()))
    assert len(open_ax.collections[0].get_segments()) == 0


def test_mask_use_is_drawn_from_never_to_always(runs, ax):
    use = routing_budget.mask_use(runs[3]).sel(block="blocks.1")
    plot_mask_use(use, ax=ax)
    np.testing.assert_array_equal(ax.images[0].get_array(), use.values)
    assert ax.images[0].get_clim() == (0, 1)
    assert [tick.get_text() for tick in ax.get_yticklabels()][:2] == ["000-024", "025-049"]


def test_frequencies_have_a_line_for_each_block_and_each_different_mask(ax):
    allowed = xr.DataArray([[1.0, 0.5, np.nan], [1.0, 0.5, np.nan], [1.0, 1.0, 0.5]], dims=("block", "channel"))
    plot_channel_frequency(allowed * 0.5, allowed, colour="#123456", ax=ax)
    of_use = [line for line in ax.lines if line.get_color() == "#123456"]
    assert (len(ax.lines), len(of_use)) == (5, 3)
    np.testing.assert_array_equal(of_use[2].get_ydata(), [0.5, 0.5, 0.25])


def test_every_run_and_the_mean_of_each_method_is_drawn(tasks, ax):
    shares = xr.DataArray(
        np.linspace(0.1, 0.9, 3 * K).reshape(3, K),
        dims=("run", "task"),
        coords={**tasks, "method": ("run", ["dtr", "baseline", "dtr"])},
    )
    mean = shares.groupby("method").mean()
    plot_task_shares(shares, mean=mean, top=1, reference=0.125, ax=ax)
    thick = [line for line in ax.lines if line.get_linewidth() > 2]
    assert [line.get_label() for line in thick] == ["Baseline", "DTR"]
    np.testing.assert_allclose(thick[1].get_ydata(), shares.values[[0, 2]].mean(0))
    thin = [line for line in ax.lines if line.get_linewidth() < 1]
    assert [line.get_color() for line in thin] == [method_colour(m) for m in ("dtr", "baseline", "dtr")]
    assert ax.get_ylim() == (0, 1)


def test_usage_bars_are_stacked_and_dead_channels_counted(ax):
    usage = xr.Dataset(
        {
            "used_share": ("block", [0.5, 1.0]),
            "silent_share": ("block", [0.2, 0.0]),
            "masked_share": ("block", [0.3, 0.0]),
            "dead": ("block", [3.0, 0.5]),
        },
        coords={"block": ["a", "b"]},
    )
    plot_usage_by_block(usage, ax=ax)
    bars = np.array([(bar.get_x(), bar.get_width()) for bar in ax.patches]).reshape(3, 2, 2)
    np.testing.assert_allclose(bars[:, 0], [[0, 0.5], [0.5, 0.2], [0.7, 0.3]])
    assert [text.get_text() for text in ax.texts] == ["3", "0.5", "dead"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]
    low, high = ax.get_ylim()
    assert low > high  # the first block is on top, as in the network


def test_block_task_shares_saturate_where_told(tasks, ax):
    share = xr.DataArray(np.full((2, K), 0.25), dims=("block", "task"), coords={**tasks, "block": ["a", "b"]})
    plot_block_task_shares(share.transpose("task", "block"), top=0.5, ax=ax)
    assert ax.images[0].get_array().shape == (2, K)
    assert ax.images[0].get_clim() == (0, 0.5)
    assert [text.get_text() for text in ax.texts] == [".25"] * 2 * K


def test_specialisation_boxes_have_their_reference(ax):
    rng = np.random.default_rng(0)
    methods, blocks = ("dtr", "baseline"), ("a", "b")
    channels = pd.DataFrame(
        [(m, b, v) for m in methods for b in blocks for v in rng.random(50)],
        columns=["method", "block", "specialisation"],
    )
    reference = pd.DataFrame(
        [("baseline", "a", 0.1), ("dtr", "b", 0.3), ("dtr", "a", np.nan)], columns=["method", "block", "value"]
    )
    plot_specialisation(channels, reference=reference, ax=ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["Baseline", "DTR", "noise alone"]
    segments = [segment for lines in ax.collections for segment in lines.get_segments()]
    drawn = [tuple(segment[:, 0]) + tuple(segment[:, 1]) for segment in segments if len(segment)]
    assert drawn == [
        (0.1, 0.1, pytest.approx(-0.4), pytest.approx(0)),
        (0.3, 0.3, pytest.approx(1), pytest.approx(1.4)),
    ]
    medians = [line.get_xdata()[0] for line in ax.lines if line.get_color() == "white"]
    expected = channels.groupby(["method", "block"])["specialisation"].median()
    assert sorted(medians) == pytest.approx(sorted(expected))


def test_the_budget_is_stacked_by_whom_it_is_shared_with(tasks, ax):
    share = xr.DataArray(
        np.tile([0.4, 0.1, 0.2, 0.05], (K, 1)),
        dims=("task", "group"),
        coords={**tasks, "group": list(routing_budget.GROUPS)},
    )
    allowed = xr.DataArray(np.full(K, 0.8), dims="task")
    plot_routing_budget(share, allowed=allowed, ax=ax)
    bars = [bar for bar in ax.patches if hasattr(bar, "get_height")]
    tops = np.array([bar.get_y() + bar.get_height() for bar in bars]).reshape(4, K)
    np.testing.assert_allclose(tops[:, 0], [0.4, 0.5, 0.7, 0.75])
    line = next(patch for patch in ax.patches if patch.get_label() == "allowed")
    np.testing.assert_array_equal(line.get_data().values, 0.8)
    assert len(ax.get_legend().get_texts()) == 5
