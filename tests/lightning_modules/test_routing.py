"""Tests for `lightning_modules/routing.py`."""

import copy
import pickle

import numpy as np
import pytest
import torch

from lightning_modules.backbones.dit import DiT, DiTConfig
from lightning_modules.routing import ChannelRouting, MaskConfig, channel_masks, masked_block, route, unroute

CONFIG = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=40, depth=3, num_heads=4, num_classes=3, learn_sigma=False
)

VARIANTS = [
    (kind, settings)
    for kind in ("dtr", "random", "cluster", "learned")
    for settings in ({}, {"per_block": True}, {"beta_last": 0.8}, {"per_block": True, "beta_last": 0.25})
]


def awake(seed: int = 0) -> DiT:
    """A DiT whose zero-initialised gates are open, so that every block matters."""
    torch.manual_seed(seed)
    model = DiT(CONFIG).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.linspace(0, 999, batch).long(), torch.arange(batch) % 3


def test_a_masked_block_is_block_of_mz_plus_the_rest():
    model = awake()
    z = torch.randn(2, 16, 40, dtype=torch.float64)
    c = torch.randn(2, 40, dtype=torch.float64)
    mask = torch.rand(2, 40) < 0.5
    m = mask.double()[:, None, :].expand_as(z)
    expected = model.blocks[0](m * z, c) + (1 - m) * z
    assert torch.equal(masked_block(model.blocks[0], mask, z, c), expected)


def test_a_routed_model_applies_each_samples_own_mask_in_every_block():
    model = awake()
    x, t, y = inputs()
    route(model, MaskConfig(alpha=1, beta=0.5), 1000)
    together = model(x, t, y)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    seen = []
    handles = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in model.blocks]
    model(x, t, y)
    for handle in handles:
        handle.remove()
    mask = torch.from_numpy(channel_masks(MaskConfig(alpha=1, beta=0.5), 1000, 40))[t]
    assert len(seen) == 3
    for z in seen:
        assert ((z != 0).any(1) == mask).all()


@pytest.mark.parametrize("kind", ["dtr", "random", "cluster", "learned"])
def test_beta_one_equals_the_plain_model_bit_for_bit_with_its_gradients(kind):
    plain, routed = awake(), awake()
    route(routed, MaskConfig(kind=kind, beta=1.0))
    x, t, y = inputs()
    outputs = [model(x, t, y) for model in (plain, routed)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    gradients = {name: q.grad for name, q in routed.named_parameters()}
    for name, p in plain.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, gradients[name]), name


@pytest.mark.parametrize("kind", ["dtr", "cluster", "learned"])
def test_unrouting_restores_the_plain_model(kind):
    model = awake()
    x, t, y = inputs()
    keys, before = list(model.state_dict()), model(x, t, y)
    route(model, MaskConfig(kind=kind))
    assert not torch.equal(model(x, t, y), before)
    with pytest.raises(ValueError, match="unroute"):
        route(model, MaskConfig())
    unroute(model)
    assert torch.equal(model(x, t, y), before)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_fixed_masks_add_neither_parameters_nor_checkpoint_keys_and_all_survive_a_copy(kind, settings, copied):
    plain, routed = awake(), awake()
    route(routed, MaskConfig(kind=kind, beta=0.5, **settings))
    added = set(routed.state_dict()) - set(plain.state_dict())
    size = sum(p.numel() for p in routed.parameters()) - sum(p.numel() for p in plain.parameters())
    if kind == "learned":
        tables = [f"block{block}" for block in range(3)] if settings.get("per_block") else ["c40"]
        assert added == {f"routing.learned.{table}.logits" for table in tables}
        assert size == 8 * 40 * len(tables)
    else:
        assert not added
        assert size == 0
    x, t, y = inputs()
    assert torch.equal(copied(routed)(x, t, y), routed(x, t, y))


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_a_routed_forward_pass_reads_each_blocks_own_masks(kind, settings):
    """Written out from `block_masks`, with the shares that beta and beta_last ask for."""
    model = awake()
    routing = route(model, MaskConfig(kind=kind, beta=0.5, **settings), 1000)
    masks = [routing.block_masks(block) for block in range(3)]
    betas = np.linspace(0.5, settings.get("beta_last", 0.5), 3)
    for mask, beta in zip(masks, betas, strict=True):
        assert mask.shape == (1000, 40)
        assert abs(mask.sum(1) - 40 * beta).max() <= (4 if kind == "cluster" else 1)
    differ = (masks[0] != masks[1]).any()
    assert differ == bool(settings)
    x, t, y = inputs()
    seen = []
    handles = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in model.blocks]
    model(x, t, y)
    for handle in handles:
        handle.remove()
    for z, mask in zip(seen, masks, strict=True):
        assert ((z != 0).any(1).numpy() == mask[t]).all()


def test_blocks_share_their_learned_masks_unless_told_otherwise():
    shared = ChannelRouting(MaskConfig(kind="learned"), 100, [20, 30, 20])
    assert list(shared.learned) == ["c20", "c30"]
    first, _, last = shared(torch.tensor([5, 50]))
    assert first is last
    own = ChannelRouting(MaskConfig(kind="learned", per_block=True), 100, [20, 20])
    assert (own.block_masks(0) != own.block_masks(1)).any()
    falling = ChannelRouting(MaskConfig(kind="learned", beta=0.9, beta_last=0.3), 100, [20, 20, 20])
    assert len(falling.learned) == 1
    wide, middle, narrow = (falling.block_masks(block) for block in range(3))
    assert [int(mask[0].sum()) for mask in (wide, middle, narrow)] == [18, 12, 6]
    assert (wide | middle | narrow == wide).all(), "one ranking, cut at each block's share"
    assert (middle | narrow == middle).all()


def test_masks_follow_the_logits_as_they_are_now():
    model = awake()
    routing = route(model, MaskConfig(kind="learned", beta=0.5, clusters=2))
    assert routing.is_learned
    with torch.no_grad():
        routing.learned["c40"].logits.copy_(torch.arange(40).float() * torch.tensor([[1.0], [-1.0]]))
    masks = routing.block_masks(0)
    assert masks[:500, 20:].all()
    assert masks[500:, :20].all()
    assert masks.sum() == 1000 * 20
    assert not route(awake(), MaskConfig(kind="cluster")).is_learned


def test_learned_masks_take_part_in_mixed_precision():
    model = awake().float()
    route(model, MaskConfig(kind="learned", beta=0.5))
    x, t, y = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x.float(), t, y).float().square().mean().backward()
    gradient = model.routing.learned["c40"].logits.grad
    assert gradient.dtype == torch.float32
    assert (gradient[[0, 1, 3, 4, 6, 7]] != 0).any(1).all(), "clusters of the batch's timesteps"
    assert (gradient[[2, 5]] == 0).all(), "no timestep of theirs in it"
    half = awake().bfloat16()
    route(half, MaskConfig(kind="learned", beta=0.5))
    assert half.bfloat16()(x.bfloat16(), t, y).dtype == torch.bfloat16


def test_two_models_with_different_routings_do_not_disturb_each_other():
    first, second = awake(), awake()
    x, t, y = inputs()
    route(first, MaskConfig(beta=0.5))
    alone = first(x, t, y)
    route(second, MaskConfig(kind="random", beta=0.3))
    second(x, t, y)
    assert torch.equal(first(x, t, y), alone)


def test_continuous_timesteps_use_the_task_they_fall_into():
    routing = ChannelRouting(MaskConfig(alpha=1, beta=0.5), 10, [20])
    whole = routing(torch.tensor([0, 3, 9]))[0]
    assert torch.equal(routing(torch.tensor([0.0, 3.7, 9.99]))[0], whole)
    for bad in (torch.tensor([10]), torch.tensor([-1]), torch.tensor([-0.5])):
        with pytest.raises(ValueError, match=r"\[0, 10\)"):
            routing(bad)


def test_a_blocks_masks_do_not_depend_on_other_tasks_of_the_batch():
    routing = ChannelRouting(MaskConfig(kind="random", per_block=True), 100, [20, 20])
    t = torch.tensor([5, 50])
    for block, masks in enumerate(routing(t)):
        assert (masks.numpy() == routing.block_masks(block)[t]).all()
    assert (routing.block_masks(0) != routing.block_masks(1)).any()
