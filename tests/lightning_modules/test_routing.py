"""Tests for `lightning_modules/routing.py`."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.backbones.dit import DiT, DiTConfig
from lightning_modules.errors import UserInputError
from lightning_modules.routing import (
    ChannelRouting,
    MaskConfig,
    channel_masks,
    dtr_windows,
    masked_block,
    route,
    unroute,
)

CONFIG = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=40, depth=3, num_heads=4, num_classes=3, learn_sigma=False
)


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


def paper_mask(T: int, C: int, alpha: float, beta: float) -> np.ndarray:
    """The definition of the paper, term by term."""
    C_b = int(beta * C)
    mask = np.zeros((T, C), dtype=bool)
    for t in range(1, T + 1):
        for c in range(1, C + 1):
            low = round((C - C_b) * ((t - 1) / T) ** alpha)
            high = round((C - C_b) * (t / T) ** alpha) + C_b
            mask[t - 1, c - 1] = low < c <= high
    return mask


@given(
    st.integers(1, 60), st.integers(2, 40), st.sampled_from([0.25, 0.5, 1, 4, 8]), st.sampled_from([0.3, 0.5, 0.8, 1])
)
def test_the_paper_variant_is_the_papers_formula(T, C, alpha, beta):
    if int(beta * C) == 0:
        return
    config = MaskConfig(alpha=alpha, beta=beta, variant="paper")
    assert (channel_masks(config, T, C) == paper_mask(T, C, alpha, beta)).all()


def test_distinct_windows_are_as_many_as_the_fact_sheet_counts():
    """Numbers of distinct mask rows at T = 1000, alpha 4, beta 0.8, found independently of this code."""
    for C, official, paper in [(384, 78, 155), (768, 155, 301), (1024, 206, 365), (1152, 232, 389)]:
        for variant, expected in (("official", official), ("paper", paper)):
            assert len(np.unique(channel_masks(MaskConfig(variant=variant), 1000, C), axis=0)) == expected


def test_the_variants_differ_in_one_channel_per_unit_of_shift():
    paper, official = (channel_masks(MaskConfig(variant=v), 1000, 384) for v in ("paper", "official"))
    assert (paper ^ official).sum() == 384 - 307
    assert (paper ^ official).sum(1).max() == 1


def test_official_windows_have_a_fixed_width_and_end_at_the_last_channel():
    windows = dtr_windows(50, 48, alpha=0.5, beta=0.6, variant="official")
    assert set(windows[:, 1]) == {28}
    assert windows[0, 0] == 0
    assert windows[-1].sum() == 48


def test_random_masks_are_seeded_and_have_beta_c_channels_each():
    config = MaskConfig(kind="random", beta=0.8, seed=3)
    masks = channel_masks(config, 100, 50)
    assert (masks.sum(1) == 40).all()
    assert (masks == channel_masks(config, 100, 50, block=5)).all(), "shared by all blocks"
    assert (masks != channel_masks(MaskConfig(kind="random", seed=4), 100, 50)).any()
    per_block = MaskConfig(kind="random", seed=3, per_block=True)
    assert (channel_masks(per_block, 100, 50, 0) != channel_masks(per_block, 100, 50, 1)).any()
    # Two random masks share 0.8 * 40 channels on average; DTR's neighbours share nearly all.
    assert (masks[:-1] & masks[1:]).sum(1).mean() == pytest.approx(32, abs=0.5)


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


@pytest.mark.parametrize("kind", ["dtr", "random"])
def test_beta_one_equals_the_plain_model_bit_for_bit_with_its_gradients(kind):
    plain, routed = awake(), awake()
    route(routed, MaskConfig(kind=kind, beta=1.0))
    x, t, y = inputs()
    outputs = [model(x, t, y) for model in (plain, routed)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), routed.parameters(), strict=True):
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad), name


def test_unrouting_restores_the_plain_model():
    model = awake()
    x, t, y = inputs()
    before = model(x, t, y)
    route(model, MaskConfig())
    assert not torch.equal(model(x, t, y), before)
    with pytest.raises(ValueError, match="unroute"):
        route(model, MaskConfig())
    unroute(model)
    assert torch.equal(model(x, t, y), before)


def test_routing_adds_neither_parameters_nor_checkpoint_keys_and_survives_a_copy():
    plain, routed = awake(), awake()
    route(routed, MaskConfig(kind="random", per_block=True))
    assert list(plain.state_dict()) == list(routed.state_dict())
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in routed.parameters())
    x, t, y = inputs()
    assert torch.equal(copy.deepcopy(routed)(x, t, y), routed(x, t, y))


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


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": 1.5}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"alpha": 0}, "alpha"),
        ({"kind": "dtr2"}, "kind"),
        ({"variant": "code"}, "variant"),
        ({"per_block": True}, "per_block"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, culprit):
    with pytest.raises(UserInputError, match=culprit):
        MaskConfig(**settings)


def test_a_beta_that_leaves_no_channel_is_refused():
    with pytest.raises(UserInputError, match="leaves none of 3 channels"):
        channel_masks(MaskConfig(beta=0.2), 10, 3)
