"""Tests for `lightning_modules/learned_masks.py`: hard masks, their straight-through gradient, its split by group."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.backbones.build import build_backbone
from lightning_modules.checkpoint import load_denoiser
from lightning_modules.ema import warm_decay
from lightning_modules.gradients import gramian_by_subbatches
from lightning_modules.learned_masks import LearnedMasks, largest, straight_through
from lightning_modules.routing import MaskConfig, route
from lightning_modules.timesteps import TimestepIntervals
from tests.conftest import BACKBONE, UNET
from tests.lightning_modules.gradients.support import GROUP, normal, shaken, squares
from tests.oracles.group_gradients import assert_exact, record, trainable

INTERVALS = TimestepIntervals.explicit([0, 4, 5, 20])


def learned(channels=10, temperature=1.0, seed=0):
    return LearnedMasks(INTERVALS, channels, seed=[seed], temperature=temperature).double()


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
def test_the_largest_are_kept_and_of_equal_ones_the_first(values, data):
    count = data.draw(st.integers(1, len(values)))
    ranked = sorted(range(len(values)), key=lambda c: (-values[c], c))
    expected = [float(c in ranked[:count]) for c in range(len(values))]
    assert largest(torch.tensor(values, dtype=torch.float32), count).tolist() == expected


def test_every_sample_gets_the_mask_of_its_cluster():
    masks = learned()
    with torch.no_grad():
        masks.logits.copy_(torch.tensor([range(10), range(10, 0, -1), [0, 9] * 5]))
    rows = torch.tensor([3, 4, 5, 19, 0])
    expected = [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4], [1, 3, 5, 7, 9], [1, 3, 5, 7, 9], [5, 6, 7, 8, 9]]
    found = masks(rows, 5)
    assert found.unique().tolist() == [0, 1], "exactly"
    assert [row.nonzero().flatten().tolist() for row in found] == expected
    assert (masks.masks(5)[rows] == found.detach().bool().numpy()).all()
    assert masks.masks(5).shape == (20, 10)


def test_the_forward_pass_is_exactly_hard_whatever_the_logits():
    generator = torch.Generator().manual_seed(0)
    logits = 50 * torch.randn(200, 64, generator=generator)  # 1 + s - s' would miss 1 in a third of these
    mask = straight_through(logits.requires_grad_(), 51, 0.7)
    assert torch.equal(mask, largest(logits, 51))
    assert (mask.sum(1) == 51).all()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_gradient_is_that_of_the_sigmoid(temperature):
    """Of a loss linear in the mask: sum over a cluster's samples of w sigmoid'(logit / temperature) / temperature."""
    masks = learned(temperature=temperature)
    torch.nn.init.normal_(masks.logits, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([0, 3, 4, 5, 6, 19])
    weight = normal(6, 10)
    (weight * masks(rows, 4)).sum().backward()
    soft = 1 / (1 + np.exp(-masks.logits.detach().numpy() / temperature))
    summed = np.stack([weight[:2].sum(0), weight[2], weight[3:].sum(0)])
    np.testing.assert_allclose(masks.logits.grad, summed * soft * (1 - soft) / temperature, rtol=1e-12)
    assert (masks.logits.grad != 0).all(), "channels that are off learn, too"


def test_training_finds_the_channels_that_matter():
    """Each cluster's target is the sum of three channels: straight-through descent turns just those on."""
    masks = learned(channels=12)
    wanted = torch.zeros(3, 12, dtype=torch.float64)
    for cluster, channels in enumerate(([0, 1, 2], [3, 5, 7], [11, 4, 1])):
        wanted[cluster, channels] = 1.0
    optimizer = torch.optim.Adam(masks.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        t = torch.randint(20, (64,), generator=generator)
        x = torch.randn(64, 12, generator=generator, dtype=torch.float64)
        loss = ((x * (masks(t, 3) - wanted[masks.cluster_of[t]])).sum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (masks.masks(3) == wanted[masks.cluster_of].bool().numpy()).all()


def test_first_logits_are_small_seeded_and_draw_on_no_other_generator():
    before = torch.random.get_rng_state()
    first, again, other = learned(channels=400), learned(channels=400), learned(channels=400, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.logits, again.logits)
    assert (first.logits != other.logits).any()
    assert float(first.logits.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert (first.masks(300)[0] != first.masks(300)[-1]).any(), "clusters begin apart"


TIMES = torch.tensor([10, 900, 400, 300, 20, 750, 600, 5])
LABELS = torch.arange(8) % 3


def routed(config, **settings):
    model = build_backbone(config)
    route(model, MaskConfig(kind="learned", beta=0.5, **settings))
    return shaken(model)


@pytest.mark.parametrize(
    "settings", [{}, {"clusters": 3, "per_block": True}, {"beta_last": 0.9}, {"cluster_bounds": [0, 7, 1000]}]
)
@pytest.mark.parametrize("config", [BACKBONE, UNET], ids=["dit", "unet"])
def test_recorded_gramians_cover_the_logits_and_are_exact(config, settings):
    model = routed(config, **settings)
    x = normal(8, config.in_channels, 8, 8)
    gramian = assert_exact(model, lambda: squares(model(x, TIMES, LABELS)), GROUP, 5)
    tables = [layer for layer in gramian.layers if layer.startswith("routing.learned.")]
    blocks = model.block_channels
    assert len(tables) == (len(blocks) if settings.get("per_block") else len(set(blocks.values())))
    assert all(gramian.values[gramian.layers.index(table)].diagonal()[:3].gt(0).all() for table in tables)


def test_recorded_gramians_equal_those_of_one_backward_pass_per_group():
    model = routed(BACKBONE)
    x = normal(8, 1, 8, 8)
    recorded, _ = record(model, lambda: squares(model(x, TIMES, LABELS)), GROUP, 5)
    assert recorded.coverage == 1.0
    slow = gramian_by_subbatches(
        lambda rows: squares(model(x[rows], TIMES[rows], LABELS[rows])), trainable(model), GROUP, 5
    )
    assert recorded.layers == slow.layers
    for layer, found, expected in zip(slow.layers, recorded.values, slow.values, strict=True):
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max(), layer


@pytest.mark.parametrize("backbone", [BACKBONE, UNET], ids=["dit", "unet"])
def test_a_denoiser_trains_averages_and_stores_its_masks(make_denoiser, fit, tmp_path, backbone):
    module = make_denoiser("learned", backbone=backbone)
    routing = module.backbone.routing
    begun = [table.logits.detach().clone() for table in routing.learned.values()]
    fit(module, steps=1)
    averaged = list(module.ema.module.routing.learned.values())
    for table, before, mean in zip(routing.learned.values(), begun, averaged, strict=True):
        assert (table.logits != before).any()
        assert torch.equal(mean.logits, table.logits), "the first average is a copy"
        assert not mean.logits.requires_grad
        with torch.no_grad():
            table.logits += 1
    module.ema.update_parameters(module.backbone)
    for table, mean in zip(routing.learned.values(), averaged, strict=True):
        torch.testing.assert_close(table.logits - mean.logits, torch.full_like(mean.logits, warm_decay(0.9999, 1)))
        with torch.no_grad():
            mean.logits += torch.randn(mean.logits.shape, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "learned.ckpt"
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    loaded = load_denoiser(path)
    for of in (lambda m: m.backbone, lambda m: m.ema.module):
        for block in range(len(module.backbone.block_channels)):
            assert (of(loaded).routing.block_masks(block) == of(module).routing.block_masks(block)).all()
    assert (loaded.backbone.routing.block_masks(0) != loaded.ema.module.routing.block_masks(0)).any()


@pytest.mark.parametrize("method", ["dtr", "random"])
def test_checkpoints_of_the_time_before_there_were_clusters_load(make_denoiser, tmp_path, method):
    module = make_denoiser(method)
    settings = dict(module.hparams)
    new = {"clusters", "cluster_bounds", "beta_last", "temperature"}
    settings["routing"] = {name: value for name, value in settings["routing"].items() if name not in new}
    assert set(settings["routing"]) == {"kind", "alpha", "beta", "variant", "seed", "per_block"}
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": settings}, tmp_path / "old.ckpt")
    loaded = load_denoiser(tmp_path / "old.ckpt")
    assert loaded.routing_config == module.routing_config
    assert (loaded.backbone.routing.block_masks(0) == module.backbone.routing.block_masks(0)).all()
