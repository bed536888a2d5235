"""Building, summing and pooling of Gramians."""

import numpy as np
import pytest
import xarray as xr

from analysis import affinity, conflict, gramians
from lightning_modules.errors import UserInputError

LAYERS = ["blocks.0.fc", "blocks.0.proj", "final"]
TASKS, HALVES, WIDTH = 3, 2, 5


def plain_arrays(steps=2):
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((steps, len(LAYERS), TASKS * HALVES, WIDTH))
    return gradients @ gradients.swapaxes(-1, -2), rng.integers(1, 9, (steps, TASKS * HALVES))


def built(**changes):
    values, counts = plain_arrays()
    arguments = {"layers": LAYERS, "halves": HALVES, "bounds": [0, 10, 40, 100], **changes}
    return gramians.gramian_arrays(values, counts, **arguments)


def test_plain_arrays_get_the_labels_of_a_run():
    values, counts = plain_arrays()
    losses = np.random.default_rng(1).random(counts.shape)
    got = built(losses=losses, steps=[5, 7], log_snr=np.linspace(4, -4, 100))
    assert got.gramian.dims == ("gradient_step", "layer", "task", "half", "other_task", "other_half")
    assert got.gramian.sel(gradient_step=7, layer="final")[2, 1, 0, 1] == values[1, 2, 5, 1]
    assert got.group_count[1, 2, 0] == counts[1, 4]
    assert got.group_loss[0, 1, 1] == losses[0, 3]
    assert got.interval.values.tolist() == ["t00-09", "t10-39", "t40-99"]
    assert got.other_t_high.values.tolist() == [9, 39, 99]
    assert float(got.log_snr[0]) == pytest.approx(np.median(np.linspace(4, -4, 100)[:10]))
    assert "log_snr" not in built().coords
    assert "group_loss" not in built()


def test_plain_arrays_are_what_reading_a_run_gives(runs):
    run = runs[0]
    groups = run.sizes["task"] * run.sizes["half"]
    steps = run.sizes["gradient_step"]
    values = run.gramian.values.reshape(steps, -1, groups, groups)
    got = gramians.gramian_arrays(
        values,
        run.group_count.values.reshape(steps, groups),
        layers=run.layer.values.tolist(),
        halves=2,
        bounds=[*run.t_low.values, int(run.t_high[-1]) + 1],
        steps=run.gradient_step.values.tolist(),
        log_snr=run.timestep_log_snr.values,
    )
    assert got.gramian.equals(run.gramian)
    assert got.group_count.equals(run.group_count)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"layers": LAYERS[:2]}, "2 layers and 3 tasks of 2 halves need"),
        ({"halves": 3}, "3 tasks of 3 halves"),
        ({"losses": np.zeros((2, 3))}, r"losses of shape \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes, culprit):
    with pytest.raises(ValueError, match=culprit):
        built(**changes)


def test_layers_add_up(runs):
    run = runs[0]
    total = gramians.sum_layers(run.gramian, "total")
    np.testing.assert_allclose(total, run.gramian.values.astype(float).sum(1))
    blocks = gramians.sum_layers(run.gramian, "block", list(run.block.values))
    assert list(blocks.block.values) == ["x_embedder", "blocks.0", "blocks.1", "final_layer"]
    np.testing.assert_allclose(blocks.sel(block="blocks.0"), run.gramian.isel(layer=[1, 2]).sum("layer"), rtol=1e-5)
    np.testing.assert_allclose(blocks.sum("block"), total)
    by_layer = conflict.corrected_cosine(gramians.sum_layers(run.gramian, "layer"), run.group_count)
    assert by_layer.cosine.dims == ("layer", "task", "other_task")
    summed = conflict.corrected_cosine(total, run.group_count)
    assert list(summed.cosine.interval.values) == list(run.interval.values)
    assert "other_log_snr" in summed.cosine.coords


def test_pooled_probes_remember_their_run(runs):
    gramian, count = gramians.pool_runs(runs[:2])
    probes = runs[0].sizes["gradient_step"]
    assert gramian.run.values.tolist() == [0] * probes + [1] * probes
    assert count.run.equals(gramian.run)


@pytest.mark.parametrize("level", ["total", "block", "layer"])
def test_pooled_probes_follow_one_another(runs, level):
    gramian, count = gramians.pool_runs(runs[:3], level)
    one_by_one = [gramians.run_gramian(run, level) for run in runs[:3]]
    np.testing.assert_array_equal(gramian, np.concatenate(one_by_one))
    np.testing.assert_array_equal(count, np.concatenate([run["group_count"] for run in runs[:3]]))
    xr.testing.assert_equal(gramian.drop_vars("run"), xr.concat(one_by_one, "gradient_step", join="exact"))


def test_a_single_run_is_not_copied(runs):
    gramian, _ = gramians.pool_runs(runs[:1], "layer")
    assert np.shares_memory(gramian.values, runs[0].gramian.values)


def test_runs_without_gradient_probes_are_named(runs):
    bare = runs[1].drop_vars(["gramian", "group_count", "group_loss"])
    said = r"run baseline-1 has no gradient_conflict telemetry.*gradient_conflict\.every_n_steps"
    with pytest.raises(UserInputError, match=said):
        gramians.pool_runs([runs[0], bare])
    with pytest.raises(UserInputError, match=said):
        affinity.gradient_affinity(bare)


def test_blocks_are_in_the_order_of_the_network():
    """As in diffusers' U-Nets, where the state dict has the middle block last, and containers hold more than blocks."""
    layers = ("conv_in", "down.0.res.conv1", "down.0.pool", "down.1.res", "up.0.res.conv1", "up.0.pool")
    layers = (*layers, "mid.res.conv1", "mid.attention", "conv_out")
    blocks = ["down.0.res", "down.1.res", "mid.res", "up.0.res"]
    values = np.random.default_rng(0).normal(size=(1, len(layers), 2, 2))
    found = gramians.gramian_arrays(values, np.ones((1, 2), int), layers=layers, halves=1, bounds=[0, 5, 10])["gramian"]
    summed = gramians.sum_layers(found, "block", blocks)
    rows = ["conv_in", "down.0.res", "down.1.res", "down (rest)", "mid.res", "mid (rest)", "up.0.res", "up (rest)"]
    assert summed["block"].values.tolist() == [*rows, "conv_out"]
    for row, members in {"down.1.res": [3], "mid (rest)": [7], "up (rest)": [5], "conv_out": [8]}.items():
        np.testing.assert_allclose(summed.sel(block=row).values.reshape(2, 2), values[0, members].sum(0))


def test_runs_with_different_blocks_are_pooled_over_whole_networks_only(runs):
    smaller = runs[0].isel(layer=[0, 1, 2, 4])
    assert gramians.same_parts([smaller, runs[1]], "total")
    assert not gramians.same_parts([smaller, runs[1]], "block")
    for level in ("block", "layer"):
        with pytest.raises(UserInputError, match=f"different {level}s"):
            gramians.pool_runs([smaller, runs[1]], level)
    pooled, _ = gramians.pool_runs([smaller, runs[1]])
    np.testing.assert_allclose(pooled[0], smaller["gramian"][0].sum("layer", dtype=float))


def test_learned_masks_are_in_no_block_but_in_the_whole_network(runs):
    first, second = runs[0], runs[1]
    masks = first.isel(layer=[0]).assign_coords(layer=["routing.learned.c32"])
    learned = xr.concat([first[["gramian"]], masks[["gramian"]]], "layer").assign_attrs(first.attrs)
    learned = learned.assign(group_count=first["group_count"])
    assert gramians.same_parts([learned, second], "block")
    assert not gramians.same_parts([learned, second], "layer")
    xr.testing.assert_allclose(gramians.run_gramian(learned, "block"), gramians.run_gramian(first, "block"))
    total = gramians.run_gramian(first) + masks["gramian"].isel(layer=0)
    np.testing.assert_allclose(gramians.run_gramian(learned), total)


def test_a_run_with_one_layer_has_the_same_total(runs):
    summed = gramians.with_total(runs[0])
    assert summed.sizes["layer"] == 1
    np.testing.assert_array_equal(gramians.run_gramian(summed), gramians.run_gramian(runs[0]))
    assert set(summed.data_vars) == set(runs[0].data_vars)
    assert runs[0].sizes["layer"] > 1
