"""U-Net: diffusers' network with the same weights, routing by hooks on it, labels, and clear errors."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules.backbones.unet import UNet, UNetConfig, _diffusers_unet
from lightning_modules.routing import MaskConfig, channel_masks, route, unroute


def small_config(**overrides: Any) -> UNetConfig:
    """Three levels: attention on the second alone (and in the middle), a change of width, and one of resolution."""
    values = {
        "input_size": 8,
        "in_channels": 3,
        "channels": 8,
        "channel_mult": (1, 2, 3),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "head_channels": 8,
        "norm_groups": 4,
        "num_classes": 5,
    }
    return UNetConfig(**{**values, **overrides})


def shaken(config: UNetConfig, seed: int = 0) -> UNet:
    """A float64 U-Net in which no weight is zero, so that every part of the forward pass matters."""
    torch.manual_seed(0)
    model = UNet(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def inputs(config: UNetConfig) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.in_channels, config.input_size, config.input_size, generator=generator).double()
    return x, torch.tensor([0, 500, 999]), torch.tensor([0, 3, 5])


def diffusers_twin(model: UNet) -> torch.nn.Module:
    twin = _diffusers_unet(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    return twin


def mask_by_hooks(twin: torch.nn.Module, masks: list[Tensor], blocks: list[str]) -> None:
    """Routes diffusers' own network: its residual blocks' first layer is the first to see what the skip does not."""
    for mask, name in zip(masks, blocks, strict=True):
        norm = twin.get_submodule(name).norm1
        norm.register_forward_pre_hook(lambda _, args, m=mask: (args[0] * m[:, :, None, None],))


def gradients(model: torch.nn.Module, output: Tensor) -> dict[str, Tensor]:
    output.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attention", [(4,), (8, 4, 2), ()])
def test_the_plain_model_is_diffusers_bit_for_bit_with_its_gradients(attention, training):
    model = shaken(small_config(attention_resolutions=attention)).train(training)
    twin = diffusers_twin(model).train(training)
    x, t, y = inputs(model.config)
    outputs = model(x, t, y), twin(x, t, y).sample
    assert outputs[0].shape == (3, 6, 8, 8)
    assert torch.equal(*outputs)
    expected = gradients(twin, outputs[1])
    for name, gradient in gradients(model, outputs[0]).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize(
    "routing",
    [
        MaskConfig(alpha=1, beta=0.5),
        MaskConfig(variant="official"),
        MaskConfig(kind="random", beta=0.5, per_block=True),
        MaskConfig(beta=0.5, per_block=True),
        MaskConfig(kind="cluster", clusters=3, beta=0.5, beta_last=0.8),
    ],
)
def test_routing_masks_what_each_branch_reads_and_nothing_else(routing):
    model = shaken(small_config())
    twin = diffusers_twin(model)
    x, t, y = inputs(model.config)
    plain = model(x, t, y)
    route(model, routing)
    blocks = model.block_channels
    masks = [channel_masks(routing, 1000, channels, index, 15) for index, channels in enumerate(blocks.values())]
    mask_by_hooks(twin, [torch.from_numpy(mask)[t] for mask in masks], list(blocks))
    outputs = model(x, t, y), twin(x, t, y).sample
    assert not torch.allclose(outputs[0], plain)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-13)
    expected = gradients(twin, outputs[1])
    for name, gradient in gradients(model, outputs[0]).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10, msg=name)


def test_learned_masks_are_trained_by_what_all_their_blocks_read():
    """Against diffusers' network, where each block's mask (B, C) is a leaf: the chain rule by hand."""
    model = shaken(small_config())
    twin = diffusers_twin(model)
    x, t, y = inputs(model.config)
    routing = route(model, MaskConfig(kind="learned", clusters=2, beta=0.5))
    masks = [torch.from_numpy(routing.block_masks(index))[t].double().requires_grad_() for index in range(15)]
    mask_by_hooks(twin, masks, list(model.block_channels))
    outputs = model(x, t, y), twin(x, t, y).sample
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-13)
    for output in outputs:
        output.square().sum().backward()
    for name, table in routing.learned.items():
        used = [mask.grad for mask in masks if f"c{mask.shape[1]}" == name]
        of_samples = torch.stack(used).sum(0)
        of_clusters = torch.stack([of_samples[0], of_samples[1] + of_samples[2]])
        soft = table.logits.detach().double().sigmoid()
        torch.testing.assert_close(table.logits.grad.double(), of_clusters * soft * (1 - soft), rtol=1e-5, atol=1e-5)


def test_masked_channels_reach_the_output_by_the_skip_alone():
    model = shaken(small_config())
    conditioning = torch.randn(2, 32, dtype=torch.float64)
    blocks = [module for module in model.modules() if type(module).__name__ == "ResidualBlock"]
    assert len(blocks) == len(model.block_channels) == 3 + 2 + 2 + 6 + 2
    for block in blocks:
        x = torch.randn(2, block.channels, 4, 4, dtype=torch.float64)
        mask = torch.arange(block.channels).expand(2, -1) % 3 > 0
        nudge = torch.randn_like(x) * ~mask[:, :, None, None]

        def skip(images, block=block):
            images = images if block.resample is None else block.resample(images)
            return images if block.conv_shortcut is None else block.conv_shortcut(images)

        def branch(images, mask, block=block, skip=skip):
            return block(images, conditioning, mask) - skip(images)

        torch.testing.assert_close(branch(x + nudge, mask), branch(x, mask), rtol=1e-10, atol=1e-10)
        assert not torch.allclose(branch(x + nudge, None), branch(x, None), rtol=1e-3), "unmasked, they matter"
        assert not torch.allclose(skip(x + nudge), skip(x), rtol=1e-3)


def test_each_sample_has_its_own_mask_and_observers_see_it():
    model = shaken(small_config())
    x, t, y = inputs(model.config)
    routing = route(model, MaskConfig(alpha=1, beta=0.5))
    together = model(x, t, y)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    seen: dict[tuple[str, str], Tensor] = {}
    handles = model.observe_branches(lambda block, site, values: seen.__setitem__((block, site), values))
    model(x, t, y)
    for index, (block, channels) in enumerate(model.block_channels.items()):
        read = seen[block, "input"]
        assert read.shape[::2] == (3, channels)
        assert ((read != 0).any(1).numpy() == routing.block_masks(index)[t]).all()
        module = model.get_submodule(block)
        assert seen[block, "update"].shape[2] == module.conv2.out_channels
    for handle in handles:
        handle.remove()
    seen.clear()
    model(x, t, y)
    assert not seen


def test_blocks_are_named_in_the_order_they_run_with_the_channels_they_read():
    model = shaken(small_config())
    order: list[str] = []
    for name in model.block_channels:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    model(*inputs(model.config))
    assert order == list(model.block_channels)
    assert model.block_channels["up_blocks.0.resnets.0"] == 24 + 24, "what comes up, then the encoder's"
    assert model.block_channels["up_blocks.1.resnets.1"] == 16 + 8
    route(model, MaskConfig(beta=0.5))
    assert set(dict(model.routing.named_buffers())) == {f"masks_c{c}" for c in model.block_channels.values()}


def test_beta_one_is_the_plain_model_and_unrouting_restores_it():
    plain, routed = shaken(small_config()), shaken(small_config())
    x, t, y = inputs(plain.config)
    before = plain(x, t, y)
    route(routed, MaskConfig(beta=1.0))
    assert list(routed.state_dict()) == list(plain.state_dict())
    assert sum(1 for _ in routed.parameters()) == sum(1 for _ in plain.parameters())
    output = routed(x, t, y)
    assert torch.equal(output, before)
    expected = gradients(plain, before)
    for name, gradient in gradients(routed, output).items():
        assert torch.equal(gradient, expected[name]), name
    unroute(routed)
    route(routed, MaskConfig(beta=0.5))
    assert torch.equal(copy.deepcopy(routed)(x, t, y), routed(x, t, y))
    assert not torch.equal(routed(x, t, y), before)
    unroute(routed)
    assert torch.equal(routed(x, t, y), before)


def test_the_initial_model_is_zero_and_so_is_every_branch():
    torch.manual_seed(0)
    model = UNet(small_config())
    x, t, y = inputs(model.config)
    assert (model(x.float(), t, y) == 0).all()
    seen = []
    model.observe_branches(lambda _, site, values: seen.append(values) if site == "update" else None)
    model(x.float(), t, y)
    assert all((values == 0).all() for values in seen)
    attention = model.mid_block.attentions[0]
    h = torch.randn(2, 24, 2, 2)
    assert torch.equal(attention(h), h)


def test_unconditional_and_single_level_models():
    config = small_config(num_classes=0, channel_mult=(1,), attention_resolutions=(), learn_sigma=False)
    model = shaken(config)
    x, t, y = inputs(config)
    assert not [key for key in model.state_dict() if "class" in key]
    assert torch.equal(model(x, t), diffusers_twin(model)(x, t).sample)
    with pytest.raises(ValueError, match="this UNet is unconditional"):
        model(x, t, y)
    with pytest.raises(ValueError, match="no null class"):
        _ = model.null_class
    with pytest.raises(ValueError, match=r"shape \(B, 3, 8, 8\)"):
        model(x[..., :4], t)


def test_labels_and_the_null_class():
    model = shaken(small_config())
    x, t, y = inputs(model.config)
    assert model.null_class == 5
    assert len(model.get_parameter("class_embedding.weight")) == 6
    assert len(UNet(small_config(label_dropout=0.0)).get_parameter("class_embedding.weight")) == 5
    with pytest.raises(ValueError, match="conditional on 5 classes"):
        model(x, t)
    assert (model(x, t, y) != model(x, t, (y + 1) % 6)).flatten(1).any(1).all()
    assert (model(x, t, y) != model(x, t + 0.5, y)).flatten(1).any(1).all(), "timesteps may be continuous"


def test_a_routed_model_compiles_into_one_graph_and_runs_under_autocast():
    model = shaken(small_config(channel_mult=(1, 2))).float()
    x, t, y = inputs(model.config)
    route(model, MaskConfig(beta=0.5))
    expected = model(x.float(), t, y)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.float(), t, y), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x.float(), t, y)
    assert low.dtype == torch.bfloat16
    assert ((low - expected).norm() / expected.norm()).item() < 0.05


def test_dtr_windows_of_every_width_slide_from_the_first_channel_to_the_last():
    model = UNet(small_config())
    routing = route(model, MaskConfig())
    for index, channels in enumerate(model.block_channels.values()):
        masks = routing.block_masks(index)
        assert masks.shape == (1000, channels)
        assert masks[0, 0]
        assert masks[999, -1]
        assert not masks[0, -1]
        assert not masks[999, 0]
        assert np.all([len(list(itertools.groupby(row))) <= 3 for row in masks[::111]]), "one window a row"
