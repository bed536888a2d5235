import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from analysis import activations, affinity, routing_budget
from lightning_modules.errors import UserInputError

LEVELS = st.sampled_from([0.0, 1e-6, 0.1, 1.0, 3.0, 10.0])
ENERGIES = arrays(float, st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(1, 7)), elements=LEVELS)


def energy(rows):
    return xr.DataArray(np.asarray(rows, float), dims=("task", "channel"))


def by_block(values):
    return xr.DataArray(values, dims=("block", "task", "channel"))


def test_used_channels():
    m = energy([[1.0, 0.0, 2.0, 1e-5], [1.0, 3.0, 0.0, 1e-5]])
    np.testing.assert_array_equal(activations.used_channels(m), [[1, 0, 1, 0], [1, 1, 0, 0]])
    silent = energy([[0.0, 0.0], [1.0, 1.0]])
    np.testing.assert_array_equal(activations.used_channels(silent), [[0, 0], [1, 1]])


def test_usage_of_a_hand_made_block():
    nan = np.nan
    m = energy([[1.0, 0.0, 2.0, 1e-5, 0.0, nan], [1.0, 3.0, 0.0, 1e-5, 0.0, nan]])
    allowed = xr.DataArray([[1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]], dims=m.dims).astype(bool)
    usage = activations.channel_usage(m, allowed)
    assert usage["channels"] == 5
    np.testing.assert_array_equal(usage["used"], [2, 2])
    np.testing.assert_array_equal(usage["idle"], [3, 3])
    np.testing.assert_array_equal(usage["masked"], [1, 1])
    np.testing.assert_array_equal(usage["silent"], [2, 2])
    assert usage["dead"] == 2
    assert usage["dead_share"] == 0.4
    np.testing.assert_allclose(usage["used_share"], 0.4)
    plain = activations.channel_usage(m)
    np.testing.assert_array_equal(plain["masked"], 0)
    np.testing.assert_array_equal(plain["silent"], plain["idle"])
    assert activations.channel_usage(m, share=1e-9)["dead"] == 1


def test_what_was_not_measured_has_no_usage():
    m = by_block([[[1.0, 2.0], [np.nan, np.nan]], [[np.nan, np.nan]] * 2])
    usage = activations.channel_usage(m)
    np.testing.assert_array_equal(usage["used"], [[2, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(usage["dead"], [0, np.nan])
    assert usage["dead_share"][1].isnull()
    assert usage["used_share"][1].isnull().all()


@settings(max_examples=15, deadline=None)
@given(ENERGIES, st.randoms(use_true_random=False))
def test_channels_have_no_order_and_absent_ones_no_influence(values, random):
    m = by_block(values * (1 + 0.1 * np.random.default_rng(0).random(values.shape)))  # no ties between tasks
    order = list(range(values.shape[-1]))
    random.shuffle(order)
    shuffled = m.isel(channel=order)
    wider = m.pad(channel=(0, 2), constant_values=np.nan)
    usage = activations.channel_usage(m)
    for other in (shuffled, wider):
        xr.testing.assert_allclose(activations.channel_usage(other), usage)
        xr.testing.assert_allclose(activations.active_overlap(other), activations.active_overlap(m))
        xr.testing.assert_allclose(activations.energy_overlap(other), activations.energy_overlap(m))
        summary = activations.specialisation_by_block(activations.channel_profile(other))
        xr.testing.assert_allclose(summary, activations.specialisation_by_block(activations.channel_profile(m)))
    xr.testing.assert_allclose(
        activations.channel_profile(shuffled), activations.channel_profile(m).isel(channel=order)
    )


@settings(max_examples=30, deadline=None)
@given(ENERGIES)
def test_every_channel_is_counted_once(values):
    m = by_block(values)
    allowed = xr.DataArray(np.random.default_rng(0).random(values.shape) < 0.5, dims=m.dims)
    usage = activations.channel_usage(m, allowed)
    np.testing.assert_array_equal(usage["used"] + usage["idle"], values.shape[-1])
    np.testing.assert_array_equal(usage["masked"] + usage["silent"], usage["idle"])
    assert (usage["dead"] <= usage["idle"].min("task")).all()
    assert (usage["effective"].fillna(1) <= values.shape[-1] * (1 + 1e-12)).all()


@pytest.mark.parametrize("active", [1, 3, 8])
def test_effective_channels_counts_equal_channels(active):
    m = energy([[2.5] * active + [0.0] * (8 - active)])
    assert activations.effective_channels(m).item() == pytest.approx(active)


def test_usage_over_training_is_that_of_each_step(runs):
    run = next(run for run in runs if run.attrs["method"] == "dtr")
    allowed = routing_budget.mask_use(run) > 0
    usage = activations.channel_usage(activations.run_energy(run), allowed)
    assert usage["used"].dims == ("activation_step", "block", "task")
    for step in (0, -1):
        one = activations.channel_usage(activations.run_energy(run).isel(activation_step=step), allowed)
        xr.testing.assert_allclose(usage.isel(activation_step=step), one)


def test_late_energy_is_of_the_last_quarter(runs):
    assert activations.late_energy(runs[0]).activation_step.values.tolist() == [800, 900, 1000]
    assert activations.late_energy(runs[0], part=0.01).activation_step.values.tolist() == [1000]
    update = runs[0].activation_mean_square.sel(site="update").isel(activation_step=slice(-3, None))
    np.testing.assert_allclose(activations.pooled_energy(runs[0], "update"), update.mean("activation_step"))


def test_a_run_without_probes_is_named(runs):
    with pytest.raises(UserInputError, match="baseline-0 has no channel activations"):
        activations.run_energy(runs[0].drop_vars("activation_mean_square"))


def test_profile_of_shared_private_loud_and_dead_channels():
    m = energy([[1.0, 0.0, 1.0, 0.0], [1.0, 2.0, 0.0, 0.0]])
    got = activations.channel_profile(xr.concat([m, m], "block"))
    assert got["specialisation"].dims == ("block", "channel")
    # Task 0: (1/2, 0, 1/2, 0); task 1: (1/3, 2/3, 0, 0). Channel 0 is split 3:2.
    entropy = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4))
    np.testing.assert_allclose(got["specialisation"][1], [1 - entropy / np.log(2), 1.0, 1.0, np.nan])
    np.testing.assert_allclose(got["effective_tasks"][0], [np.exp(entropy), 1.0, 1.0, np.nan])
    np.testing.assert_allclose(got["belonging"][0], [[0.6, 0.0, 1.0, np.nan], [0.4, 1.0, 0.0, np.nan]])
    np.testing.assert_array_equal(got["preferred"][0], [0, 1, 0, np.nan])
    np.testing.assert_allclose(got["concentration"][0], [0.6, 1.0, 1.0, np.nan])
    loud = energy([[1.0, 1.0], [9.0, 9.0]])
    np.testing.assert_allclose(activations.channel_profile(loud)["specialisation"], 0.0, atol=1e-12)


def test_a_task_that_was_not_measured_is_not_one_that_uses_nothing():
    m = energy([[1.0, 2.0], [2.0, 1.0], [np.nan, np.nan]])
    xr.testing.assert_allclose(
        activations.channel_profile(m)["specialisation"], activations.channel_profile(m[:2])["specialisation"]
    )
    alone = activations.channel_profile(m[:1])["specialisation"]
    assert alone.isnull().all()  # with one task there is nothing to belong to


def test_specialisation_by_block():
    m = by_block([[[4.0, 1.0, 0.0, 1.0], [1.0, 1.0, 3.0, 0.0]], [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, np.nan]]])
    profile = activations.channel_profile(m)
    summary = activations.specialisation_by_block(profile, (0.5,))
    np.testing.assert_allclose(
        summary["quantiles"].sel(quantile=0.5), [np.nanmedian(row) for row in profile["specialisation"].values]
    )
    np.testing.assert_allclose(summary["preferring"][0], [0.5, 0.5])
    np.testing.assert_allclose(summary["preferring"][1], [1.0, 0.0])  # ties go to the first task; the dead do not count
    np.testing.assert_allclose(summary["owned"].sum("task"), 1.0)


def probes(rng, *, steps=4, tasks=8, channels=300, images=6, tokens=16, means=1.0):
    """Mean squares (step, task, channel) of correlated Gaussian tokens; ``means`` (task, channel) are the true ones."""
    shape = (steps, tasks, images, channels)
    image = rng.standard_normal((*shape[:3], 1, channels))
    token = rng.standard_normal((*shape[:3], tokens, channels))
    values = (np.sqrt(0.7) * image + np.sqrt(0.3) * token) ** 2
    return xr.DataArray(
        values.mean((2, 3)) * means,
        dims=("activation_step", "task", "channel"),
        coords={"activation_step": range(steps)},
    )


@pytest.mark.parametrize(
    ("tasks", "steps", "images", "tolerance"), [(8, 4, 6, 0.05), (5, 6, 1, 0.08), (8, 2, 8, 0.05), (2, 2, 3, 0.15)]
)
def test_the_reference_is_what_noise_alone_shows(tasks, steps, images, tolerance):
    """Tokens of an image are correlated, so the count of a probe would be far off: only the probes can tell."""
    rng = np.random.default_rng(0)
    loudness = np.geomspace(1, 20, tasks)[:, None] * np.geomspace(0.2, 5, 3000)
    found = probes(rng, steps=steps, tasks=tasks, channels=3000, images=images, tokens=4, means=loudness)
    shown = activations.channel_profile(found.mean("activation_step"))["specialisation"]
    expected = activations.unspecialised_reference(found)
    assert float(expected.mean()) == pytest.approx(float(shown.mean()), rel=tolerance)
    by_count = (tasks - 1) / (np.log(tasks) * tasks * steps * images * 4)
    assert float(shown.mean()) > 1.5 * by_count


def test_real_specialisation_lies_far_above_the_reference():
    rng = np.random.default_rng(1)
    means = np.where(np.arange(300) % 8 == np.arange(8)[:, None], 4.0, 1.0)
    found = probes(rng, means=means)
    shown = activations.channel_profile(found.mean("activation_step"))
    noise = activations.unspecialised_reference(found)
    assert float(shown["specialisation"].median()) > 5 * float(noise.median())
    assert float((shown["preferred"] == np.arange(300) % 8).mean()) > 0.95


def test_the_reference_of_equal_dead_and_single_probes():
    same = xr.DataArray(np.ones((3, 4, 2)), dims=("activation_step", "task", "channel"))
    np.testing.assert_array_equal(activations.unspecialised_reference(same), 0.0)
    dead = same.where(xr.DataArray([True, False], dims="channel"), 0.0)
    np.testing.assert_array_equal(activations.unspecialised_reference(dead), [0.0, np.nan])
    single = activations.unspecialised_reference(same.isel(activation_step=[0]))
    assert single.isnull().all()


def test_overlaps_of_a_hand_made_case():
    coords = {"interval": ("task", ["a", "b", "c"])}
    m = energy([[1.0, 1.0, 2.0, 0.0], [1.0, 0.0, 0.0, 1.0], [np.nan] * 4]).assign_coords(coords)
    active, shared = activations.active_overlap(m), activations.energy_overlap(m)
    np.testing.assert_allclose(active, [[1, 0.25, np.nan], [0.25, 1, np.nan], [np.nan] * 3])
    np.testing.assert_allclose(shared, [[1, 0.25, np.nan], [0.25, 1, np.nan], [np.nan] * 3])
    assert active.dims == shared.dims == ("task", "other_task")
    assert list(active.other_interval.values) == ["a", "b", "c"]


@settings(max_examples=30, deadline=None)
@given(ENERGIES)
def test_overlaps_equal_brute_force_in_every_block(values):
    m = by_block(values)
    active = activations.active_overlap(m, by_block=True)
    shared = activations.energy_overlap(m, by_block=True)
    assert active.dims == shared.dims == ("block", "task", "other_task")
    for block, task, other in np.ndindex(active.shape):
        one, two = values[block, task], values[block, other]
        sets = [{c for c, v in enumerate(row) if v > 0 and v >= 1e-4 * row.mean()} for row in (one, two)]
        union = sets[0] | sets[1]
        assert active[block, task, other] == pytest.approx(len(sets[0] & sets[1]) / len(union) if union else 1.0)
        if one.any() and two.any():
            distance = 0.5 * np.abs(one / one.sum() - two / two.sum()).sum()
            assert shared[block, task, other] == pytest.approx(1 - distance)
    xr.testing.assert_allclose(activations.active_overlap(m), active.mean("block"))


def test_active_overlap_of_a_routed_run_follows_its_masks(runs):
    plain, dtr = runs[0], next(run for run in runs if run.attrs["method"] == "dtr")
    per_run = [activations.active_overlap(activations.pooled_energy(run)) for run in (plain, dtr)]
    np.testing.assert_allclose(per_run[0], 1.0)
    assert per_run[1].values[0, -1] < 0.7
    assert per_run[1].values[0, -1] == pytest.approx(affinity.mask_overlap(dtr).values[0, -1], abs=0.15)
    assert list(per_run[1].other_interval.values) == list(dtr.interval.values)
    np.testing.assert_allclose(per_run[1], activations.active_overlap(routing_budget.mask_use(dtr)))
