"""The report's figures about channels draw the statistics that they name, of the runs that they name."""

import json
import warnings

import numpy as np
import pytest

from analysis import activations, affinity, frames, routing_budget
from analysis.method_channels import method_channels
from analysis.report.channel_figures import (
    channel_count_figure,
    channels_figure,
    effective_by_block_figure,
    effective_channels_figure,
    specialisation_figure,
)
from analysis.report.routing_figures import channel_overlap_figure, routing_budget_figure
from tests.analysis import synthetic

METHODS = ("baseline", "random", "dtr")


def of(runs, method):
    return [run for run in runs if run.attrs["method"] == method]


def panels_of(made):
    """The axes that are no colour bars."""
    return [ax for ax in made.figure.axes if ax.get_label() != "<colorbar>"]


def curves_of(runs):
    """The curves about channels; those about gradients take a while."""
    return frames.curves_frame([run[["activation_mean_square"]] for run in runs])


def all_figures(runs):
    return [
        channels_figure(method_channels(runs)),
        channel_count_figure(method_channels(runs)),
        effective_channels_figure(method_channels(runs), curves_of(runs)),
        effective_by_block_figure(method_channels(runs)),
        specialisation_figure(method_channels(runs)),
        routing_budget_figure(method_channels(runs)),
        channel_overlap_figure(method_channels(runs)),
    ]


def narrowed(run, width):
    """The run with a narrower second block, as a U-Net has."""
    fields = json.loads(run.attrs["manifest"]) | {"block_channels": {"blocks.0": 32, "blocks.1": width}}
    exists = (run["block"] == "blocks.0") | (run["channel"] < width)
    run = run.assign(activation_mean_square=run["activation_mean_square"].where(exists))
    if "mask" in run:
        run = run.assign(mask=run["mask"] & exists)
    return run.assign_attrs(manifest=json.dumps(fields))


@pytest.mark.parametrize("choose", ["plain, differing blocks", "unequal", "one probe"])
def test_every_figure_can_be_drawn(runs, choose):
    chosen = {
        "unequal": [narrowed(run, 20) for run in (runs[0], runs[3])],
        "one probe": [runs[3].isel(activation_step=[0])],
        "plain, differing blocks": [runs[0], narrowed(runs[1], 8)],
    }[choose]
    if choose == "unequal":
        assert routing_budget.mask_use(chosen[-1]).notnull().sum("channel").values[:, 0].tolist() == [32, 20]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = all_figures(chosen)
        for made in figures:
            made.figure.draw_without_rendering()
    for made in figures:
        assert made.caption.endswith((".", ".)"))
        assert len(made.caption) > 100


def test_channels_are_those_of_the_first_run_beside_its_mask(runs):
    axes = panels_of(channels_figure(method_channels(runs)))
    assert [ax.get_title() for ax in axes[:3]] == ["Baseline: no mask", "Random routing: mask", "DTR: mask"]
    run = of(runs, "dtr")[0]
    np.testing.assert_array_equal(axes[2].images[0].get_array(), routing_budget.mask_use(run).values[0])
    energy = activations.pooled_energy(run).sel(block="blocks.1")
    relative = (energy / energy.mean("channel")).values
    shown = axes[8].images[0].get_array()
    np.testing.assert_allclose(shown.filled(0), relative, rtol=1e-6)
    assert axes[8].collections[0].get_segments()  # the outline of the mask
    assert not axes[6].collections[0].get_segments()  # the plain model has none
    assert {ax.images[0].get_clim() for ax in axes[3:]} == {(0.01, 10)}
    assert len(panels_of(channels_figure(method_channels(runs), shown_blocks=1))) == 6


def test_counts_are_means_over_tasks_and_seeds(runs):
    axes = channel_count_figure(method_channels(runs)).figure.axes
    usage = [routing_budget.run_usage(run).mean("task") for run in of(runs, "dtr")]
    bars = np.array([bar.get_width() for bar in axes[2].patches]).reshape(3, 2)
    for row, name in enumerate(("used_share", "silent_share", "masked_share")):
        np.testing.assert_allclose(bars[row], np.mean([each[name] for each in usage], axis=0), atol=1e-12)
    assert bars[2].min() > 0.1
    assert [ax.get_title(loc="left") for ax in axes][3] == "Baseline: written"


def test_effective_shares_by_task_and_block(runs):
    by_task, over_training = effective_channels_figure(method_channels(runs), curves_of(runs)).figure.axes
    thick = {line.get_label(): line.get_ydata() for line in by_task.lines if line.get_linewidth() > 2}
    for method, name in zip(METHODS, ("Baseline", "Random routing", "DTR"), strict=True):
        shares = [routing_budget.run_usage(run)["effective_share"] for run in of(runs, method)]
        np.testing.assert_allclose(thick[name], np.mean([share.mean("block") for share in shares], axis=0))
    assert len([line for line in over_training.lines if line.get_linewidth() < 1]) == len(runs)
    axes = panels_of(effective_by_block_figure(method_channels(runs)))
    np.testing.assert_allclose(axes[2].images[0].get_array(), np.mean(shares, axis=0))
    assert len({ax.images[0].get_clim() for ax in axes}) == 1
    assert axes[0].get_yticklabels()[1].get_text() == "blocks.1"
    assert not axes[1].yaxis.get_tick_params()["labelleft"]


def test_specialisation_is_of_all_channels_of_all_seeds(runs):
    boxes, preferring = specialisation_figure(method_channels(runs)).figure.axes
    profiles = [activations.channel_profile(activations.pooled_energy(run)) for run in of(runs, "dtr")]
    pooled = np.concatenate([profile["specialisation"].sel(block="blocks.0") for profile in profiles])
    medians = [line.get_xdata()[0] for line in boxes.lines if line.get_color() == "white"]
    assert np.nanmedian(pooled) == pytest.approx(medians[2], rel=1e-6)
    dtr = next(line for line in preferring.lines if line.get_label() == "DTR")
    shares = [activations.specialisation_by_block(profile)["preferring"].mean("block") for profile in profiles]
    np.testing.assert_allclose(dtr.get_ydata(), np.mean(shares, axis=0))


def used(run):
    return routing_budget.measured_use(routing_budget.mask_use(run), activations.pooled_energy(run))


def test_budget_bars_and_adherence(runs):
    made = routing_budget_figure(method_channels(runs))
    axes = made.figure.axes
    budgets = [routing_budget.routing_budget(used(run)) for run in of(runs, "dtr")]
    expected = np.mean([(each["per_timestep"] / each["width"]).mean("block") for each in budgets], axis=0)
    heights = [bar.get_height() for bar in axes[2].patches if hasattr(bar, "get_height")]
    np.testing.assert_allclose(np.reshape(heights, (4, synthetic.K)).T, expected)
    frequency = routing_budget.channel_frequency(used(of(runs, "random")[0]))
    np.testing.assert_allclose(axes[4].lines[-1].get_ydata(), frequency[-1])
    assert (
        "DTR: intervals use 100.0% of the channels that they may use at any timestep; no others carry" in made.caption
    )
    assert "Baseline: intervals" not in made.caption


def test_a_leak_through_the_mask_is_said(runs):
    run = of(runs, "dtr")[0]
    leaking = run.assign(activation_mean_square=run["activation_mean_square"] + 0.1)
    outside = float(routing_budget.mask_adherence(leaking)["outside"].mean())
    caption = routing_budget_figure(method_channels([leaking])).caption
    assert f"{outside:.2%} of their energy lies on other channels" in caption


def configured(run, **routing):
    fields = json.loads(run.attrs["manifest"])
    return run.assign_attrs(manifest=json.dumps(fields | {"routing": fields["routing"] | routing}))


def test_a_leak_through_learned_masks_is_put_down_to_their_moving(runs):
    run = configured(of(runs, "dtr")[0], kind="learned")
    leaking = run.assign(activation_mean_square=run["activation_mean_square"] + 0.1)
    for each, says in ((run, "no others carry energy."), (leaking, "left while the energy was measured.")):
        assert routing_budget_figure(method_channels([each])).caption.endswith(says)


def test_channels_of_blocks_with_orders_of_their_own_are_put_in_order(runs):
    plain = of(runs, "dtr")[0]
    rng = np.random.default_rng(0)
    shuffled = configured(plain.copy(deep=True), per_block=True)
    for block in range(2):
        order = rng.permutation(32)
        shuffled["mask"][block] = plain["mask"].values[block][:, order]
        shuffled["activation_mean_square"][:, block] = plain["activation_mean_square"].values[:, block][..., order]
    axes = routing_budget_figure(method_channels([shuffled])).figure.axes
    frequency = routing_budget.channel_frequency(routing_budget.mask_use(plain)).values
    assert "of each block" in axes[1].get_xlabel()
    grey = axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(grey, np.sort(frequency[0])[::-1], err_msg="both blocks have the same in another order")
    np.testing.assert_allclose(axes[1].lines[-1].get_ydata(), np.sort(frequency[1])[::-1])
    assert len(axes[1].lines) == 1 + 2
    narrow = routing_budget_figure(method_channels([narrowed(shuffled, 20)])).figure.axes[1]
    assert np.isnan(narrow.lines[-1].get_ydata()).tolist() == [False] * 20 + [True] * 12


def test_overlaps_are_on_one_scale_beside_the_mask(runs):
    axes = panels_of(channel_overlap_figure(method_channels(runs)))
    matrices = [ax.images[0].get_array().filled(np.nan) for ax in axes]
    np.testing.assert_array_equal(matrices[0], 1)  # no mask
    own = of(runs, "random")
    np.testing.assert_allclose(matrices[1], np.mean([affinity.mask_overlap(run) for run in own], axis=0))
    energies = [activations.pooled_energy(run) for run in own]
    np.testing.assert_allclose(matrices[4], np.mean([activations.active_overlap(each) for each in energies], axis=0))
    np.testing.assert_allclose(matrices[7], np.mean([activations.energy_overlap(each) for each in energies], axis=0))
    assert {ax.images[0].get_clim() for ax in axes} == {(0, 1)}
