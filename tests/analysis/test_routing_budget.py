"""Budgets against closed forms, and against sets of channels counted timestep by timestep."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import activations, affinity, routing_budget
from analysis.gramians import task_coordinates
from lightning_modules.errors import UserInputError
from lightning_modules.masks import MaskConfig, active_channels, channel_masks, cluster_shares, dtr_windows
from tests.analysis import synthetic


def routed(masks, bounds, energy=None):
    """A run with these masks by block, (T, C) each; None for a plain one of the given widths."""
    widths = {name: mask.shape[1] for name, mask in masks.items()}
    widest = max(widths.values())
    manifest = dataclasses.replace(
        synthetic.manifest(), block_channels=widths, num_timesteps=bounds[-1], interval_bounds=list(bounds)
    )
    run = task_coordinates(bounds).assign_coords(block=list(widths), channel=np.arange(widest))
    if not all(mask.all() for mask in masks.values()):
        padded = [np.pad(mask, ((0, 0), (0, widest - mask.shape[1]))) for mask in masks.values()]
        run["mask"] = (("block", "timestep", "channel"), np.stack(padded))
    if energy is not None:
        dims = ("activation_step", "block", "site", "task", "channel")
        run["activation_mean_square"] = (dims, np.stack([energy, energy], axis=1)[None])
        run = run.assign_coords(activation_step=[100], site=["input", "update"])
    run.attrs.update(name="made", manifest=json.dumps(dataclasses.asdict(manifest)))
    return run


def dtr(channels, variant="official", timesteps=1000, alpha=4.0, beta=0.8):
    return channel_masks(MaskConfig(alpha=alpha, beta=beta, variant=variant), timesteps, channels)


def budget_of(masks, bounds):
    return routing_budget.routing_budget(routing_budget.mask_use(routed(masks, bounds)))


BOUNDS = tuple(range(0, 1001, 125))


@pytest.mark.parametrize(("channels", "always"), [(384, 230), (768, 460), (1024, 614), (1152, 690)])
def test_always_on_channels_of_the_published_settings(channels, always):
    """T = 1000, alpha = 4, beta = 0.8: what stays when the window has moved over all spare channels."""
    budget = budget_of({"blocks.0": dtr(channels)}, BOUNDS)
    width = active_channels(channels, 0.8)
    np.testing.assert_array_equal(budget["per_timestep"].sel(group="always"), always)
    assert always == 2 * width - channels
    np.testing.assert_allclose(budget["per_timestep"].sum("group"), width)
    use = routing_budget.mask_use(routed({"blocks.0": dtr(channels)}, BOUNDS))
    assert int((routing_budget.channel_frequency(use) == 1).sum()) == always
    # The paper's last window may start one short of the last spare channel.
    paper = budget_of({"blocks.0": dtr(channels, "paper")}, BOUNDS)
    start = round((channels - width) * 0.999**4)
    np.testing.assert_array_equal(paper["per_timestep"].sel(group="always"), width - start)


def test_own_channels_of_a_window_are_those_it_reaches_first():
    """A window that slides upwards: only the last task has channels of its own, those beyond the one before."""
    channels = 768
    start = dtr_windows(1000, channels, alpha=4.0, beta=0.8, variant="official")[:, 0]
    budget = budget_of({"blocks.0": dtr(channels)}, BOUNDS)
    own = budget["per_timestep"].sel(group="own").values[0]
    beyond = np.maximum(start[875:] - start[874], 0).mean()
    np.testing.assert_allclose(own, [0] * 7 + [beyond])
    moved = start[[bound - 1 for bound in BOUNDS[1:]]] - start[list(BOUNDS[:-1])]
    np.testing.assert_array_equal(budget["churn"][0], 2 * moved)
    np.testing.assert_array_equal(budget["reach"][0], active_channels(channels, 0.8) + moved)


def test_random_masks_share_everything_and_keep_nothing():
    channels, beta, bounds = 400, 0.8, (0, 5, 25, 65)
    masks = channel_masks(MaskConfig(kind="random", beta=beta), 65, channels)
    budget = budget_of({"b": masks}, bounds).sel(block="b")
    np.testing.assert_allclose(budget["per_timestep"].sum("group"), beta * channels)
    n = np.diff(bounds)
    # A channel is on at all of n timesteps with probability beta^n.
    expected = channels * (1 - beta**n - (1 - beta) ** n)
    deviation = np.sqrt(channels * beta**n * (1 - beta**n))
    assert (np.abs(budget["churn"] - expected) < 4 * deviation + 1).all()
    assert budget["per_timestep"].sel(group="own").max() == 0
    # Two different timesteps differ in beta (1 - beta) of the channels, and one in n is drawn twice.
    np.testing.assert_allclose(budget["turnover"], channels * beta * (1 - beta) * (1 - 1 / n), rtol=0.1)


def test_clusters_share_the_common_channels_and_keep_their_own():
    config = MaskConfig(kind="cluster", clusters=4, beta=0.6)
    common, own = cluster_shares(100, beta=0.6, clusters=4)
    masks = {"blocks.0": channel_masks(config, 1000, 100)}
    budget = budget_of(masks, (0, 250, 500, 750, 1000))
    np.testing.assert_array_equal(budget["per_timestep"][0], [[common, 0, 0, own]] * 4)
    np.testing.assert_array_equal(budget["turnover"], 0)
    # Of tasks that are halves of clusters none has a channel alone; two have each cluster's.
    halves = budget_of(masks, BOUNDS)
    np.testing.assert_array_equal(halves["per_timestep"][0], [[common, 0, own, 0]] * 8)
    # A task that lies over the border of two clusters uses either's channels half of the time.
    astride = budget_of(masks, (0, 125, 375, 1000))
    np.testing.assert_array_equal(astride["per_timestep"][0, 1], [common, 0, own, 0])
    assert float(astride["churn"][0, 1]) == 2 * own


@pytest.mark.parametrize("kind", ["dtr", "cluster"])
def test_orders_of_their_own_leave_every_blocks_budget_and_overlap_as_they_are(kind):
    def masks(**settings):
        config = MaskConfig(kind=kind, beta=0.5, **settings)
        return {f"blocks.{block}": channel_masks(config, 1000, 120, block, 3) for block in range(3)}

    shared, shuffled = routed(masks(), BOUNDS), routed(masks(per_block=True), BOUNDS)
    assert (shuffled["mask"][0] != shuffled["mask"][1]).any()
    budgets = [routing_budget.routing_budget(routing_budget.mask_use(run)) for run in (shared, shuffled)]
    xr.testing.assert_allclose(*budgets)
    np.testing.assert_allclose(affinity.mask_overlap(shuffled), affinity.mask_overlap(shared))
    falling = routed(masks(per_block=True, beta_last=0.25), BOUNDS)
    widths = routing_budget.routing_budget(routing_budget.mask_use(falling))["per_timestep"].sum("group").max("task")
    np.testing.assert_allclose(widths, [60, 45, 30], atol=4 if kind == "cluster" else 1)
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize("kind", ["dtr", "random", "arbitrary"])
def test_budgets_equal_sets_counted_timestep_by_timestep(kind):
    bounds = (0, 3, 4, 12, 20)
    if kind == "arbitrary":
        masks = {name: np.random.default_rng(c).random((20, c)) < 0.5 for name, c in (("a", 9), ("b", 5))}
        masks["a"][:, 0] = True
        masks["b"][:, 1] = False
        masks["a"][:4, 2], masks["a"][4:, 2] = True, False
        masks["a"][:3, 3], masks["a"][3:, 3] = True, False
    else:
        masks = {
            name: channel_masks(MaskConfig(kind=kind, alpha=1.0, beta=0.5), 20, c) for name, c in (("a", 9), ("b", 5))
        }
    budget = budget_of(masks, bounds)
    for block, mask in masks.items():
        sets = [{int(c) for c in np.flatnonzero(row)} for row in mask]
        tasks = [range(low, high) for low, high in itertools.pairwise(bounds)]
        anywhen = [set().union(*(sets[t] for t in task)) for task in tasks]
        assert int(budget["width"].sel(block=block)) == mask.shape[1]
        for k, task in enumerate(tasks):
            others = [reach for j, reach in enumerate(anywhen) if j != k]
            counts = dict.fromkeys(routing_budget.GROUPS, 0.0)
            for c in itertools.chain.from_iterable(sets[t] for t in task):
                if all(c in each for each in sets):
                    group = "always"
                elif all(c in reach for reach in others):
                    group = "all_tasks"
                else:
                    group = "some_tasks" if any(c in reach for reach in others) else "own"
                counts[group] += 1 / len(task)
            own = budget.sel(block=block).isel(task=k)
            np.testing.assert_allclose(own["per_timestep"], list(counts.values()), atol=1e-12)
            assert own["reach"] == len(anywhen[k])
            assert own["churn"] == len(anywhen[k]) - len(set.intersection(*(sets[t] for t in task)))
            pairs = [len(sets[t] - sets[s]) for t in task for s in task]
            assert float(own["turnover"]) == pytest.approx(np.mean(pairs))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 4))
def test_budgets_do_not_depend_on_the_order_or_the_padding_of_channels(seed, channels, tasks):
    rng = np.random.default_rng(seed)
    use = xr.DataArray(rng.choice([0.0, 0.3, 1.0], (2, tasks, channels)), dims=("block", "task", "channel"))
    budget = routing_budget.routing_budget(use)
    xr.testing.assert_allclose(routing_budget.routing_budget(use.isel(channel=rng.permutation(channels))), budget)
    wider = use.pad(channel=(0, 3), constant_values=np.nan)
    xr.testing.assert_allclose(routing_budget.routing_budget(wider), budget)
    np.testing.assert_allclose(budget["per_timestep"].sum("group"), use.sum("channel"))


def test_use_is_the_share_of_timesteps():
    masks = {"a": np.random.default_rng(0).random((20, 6)) < 0.5, "b": np.random.default_rng(1).random((20, 4)) < 0.5}
    use = routing_budget.mask_use(routed(masks, (0, 3, 20)))
    np.testing.assert_allclose(use.sel(block="a").isel(task=1), masks["a"][3:].mean(0))
    np.testing.assert_allclose(use.sel(block="b").isel(task=0), [*masks["b"][:3].mean(0), np.nan, np.nan])
    frequency = routing_budget.channel_frequency(use)
    np.testing.assert_allclose(frequency.sel(block="a"), masks["a"].mean(0))
    np.testing.assert_allclose(frequency.sel(block="b"), [*masks["b"].mean(0), np.nan, np.nan])


def test_a_plain_run_shares_everything_with_all(runs):
    allowed = routing_budget.mask_use(runs[0])
    for use in (allowed, routing_budget.measured_use(allowed, activations.pooled_energy(runs[0]))):
        budget = routing_budget.routing_budget(use)
        np.testing.assert_array_equal(budget["per_timestep"].sel(group="always"), 32)
        np.testing.assert_array_equal(budget["churn"], 0)
    unequal = routed({"a": np.ones((20, 6), bool), "b": np.ones((20, 4), bool)}, (0, 3, 20))
    assert "mask" not in unequal
    budget = routing_budget.routing_budget(routing_budget.mask_use(unequal))
    np.testing.assert_array_equal(budget["width"], [6, 4])
    np.testing.assert_array_equal(budget["per_timestep"].sel(group="always"), [[6, 6], [4, 4]])


def test_measured_use_leaves_out_what_is_allowed_but_silent():
    masks = {"a": np.ones((20, 3), bool)}
    masks["a"][:6, 0] = False
    energy = np.array([[[1.0, 1.0, 1e-9], [1.0, 1.0, 0.5], [np.nan] * 3]])
    run = routed(masks, (0, 4, 8, 20), energy)
    use = routing_budget.measured_use(routing_budget.mask_use(run), activations.pooled_energy(run))
    # Channel 0 is masked for task 0, although energy was (wrongly) found there.
    np.testing.assert_allclose(use[0], [[0, 1, 0], [0.5, 1, 1], [np.nan] * 3])
    budget = routing_budget.routing_budget(use)
    np.testing.assert_allclose(budget["per_timestep"][0, :2], [[1, 0, 0, 0], [1, 0, 0, 1.5]])
    assert budget["reach"][0, 2].isnull()
    assert budget["per_timestep"][0, 2].isnull().all()
    np.testing.assert_allclose(routing_budget.channel_frequency(use)[0], [0.25, 1, 0.5])


def test_adherence_finds_a_leak_and_unused_channels():
    masks = {"a": np.ones((20, 4), bool)}
    masks["a"][:10, :2] = False
    kept = np.array([[[0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]])
    found = routing_budget.mask_adherence(routed(masks, (0, 10, 20), kept))
    np.testing.assert_array_equal(found["outside"], 0)
    np.testing.assert_array_equal(found["allowed"], [[2, 4]])
    np.testing.assert_allclose(found["used_of_allowed"], [[0.5, 1]])
    leaking = kept + np.array([0.25, 0.0, 0.0, 0.0])
    found = routing_budget.mask_adherence(routed(masks, (0, 10, 20), leaking))
    np.testing.assert_allclose(found["outside"], [[0.2, 0]])
    np.testing.assert_allclose(found["used_of_allowed"], [[0.5, 1]])


def test_adherence_of_routed_runs_and_refusal_of_plain_ones(runs):
    dtr_run = next(run for run in runs if run.attrs["method"] == "dtr")
    assert float(routing_budget.mask_adherence(dtr_run)["outside"].max()) == 0
    with pytest.raises(ValueError, match="baseline-0 is not routed"):
        routing_budget.mask_adherence(runs[0])
    with pytest.raises(UserInputError, match="no channel activations"):
        routing_budget.mask_adherence(dtr_run.drop_vars("activation_mean_square"))


def test_usage_beside_the_mask_is_of_the_input_only(runs):
    run = next(run for run in runs if run.attrs["method"] == "dtr")
    usage = routing_budget.run_usage(run)
    off = (routing_budget.mask_use(run) == 0).sum("channel")
    assert off.max() > 0
    np.testing.assert_array_equal(usage["masked"], off)
    np.testing.assert_array_equal(usage["silent"], 0)
    np.testing.assert_array_equal(routing_budget.run_usage(run, "update")["masked"], 0)
    everywhere = activations.used_channels(activations.pooled_energy(run)).sum("channel")
    np.testing.assert_array_equal(usage["used"], everywhere)
