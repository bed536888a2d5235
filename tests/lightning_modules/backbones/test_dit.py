"""DiT: key names and sizes of the published models, a slow forward pass written out, routing, and clear errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_modules.backbones.dit import DIT_PRESETS, DiT, DiTConfig, dit_config
from lightning_modules.backbones.dit_layers import position_embedding, timestep_embedding
from lightning_modules.errors import UserInputError
from lightning_modules.routing import MaskConfig, route, unroute

# Published parameter counts of the trained weights at 256 x 256 (latents 32 x 32 x 4, 1000 classes), in millions:
# Peebles & Xie (2023), tables 1 and 4.
PUBLISHED_MILLIONS = {"DiT-S/2": 33, "DiT-B/4": 130, "DiT-B/8": 131, "DiT-L/2": 458, "DiT-XL/2": 675, "DiT-XL/8": 676}


def small_config(**overrides: object) -> DiTConfig:
    values = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 4}
    return DiTConfig(**{**values, "num_classes": 5, **overrides})


def shaken(config: DiTConfig, seed: int = 0) -> DiT:
    """A float64 DiT in which no weight is zero, so that every part of the forward pass matters."""
    model = DiT(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def inputs(config: DiTConfig, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(
        batch, config.in_channels, config.input_size, config.input_size, generator=generator, dtype=torch.float64
    )
    return x, torch.tensor([0, 500, 999])[:batch], torch.tensor([0, 3, 5])[:batch]


def slow_block(weights: dict[str, Tensor], prefix: str, x: Tensor, c: Tensor, heads: int) -> Tensor:
    """One adaLN-Zero block for one sample, x (N, C) and c (C,), with attention head by head."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{prefix}.{name}.weight"].T + weights[f"{prefix}.{name}.bias"]

    def norm(value: Tensor) -> Tensor:
        centred = value - value.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()

    shift1, scale1, gate1, shift2, scale2, gate2 = linear("adaLN_modulation.1", c * c.sigmoid()).split(x.shape[1])
    q, k, v = linear("attn.qkv", norm(x) * (1 + scale1) + shift1).split(x.shape[1], dim=1)
    width, mixed = x.shape[1] // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        mixed.append((q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(1) @ v[:, part])
    x = x + gate1 * linear("attn.proj", torch.cat(mixed, dim=1))
    inner = linear("mlp.fc1", norm(x) * (1 + scale2) + shift2)
    gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return x + gate2 * linear("mlp.fc2", gelu)


def slow_forward(model: DiT, x: Tensor, t: int, y: int) -> Tensor:
    """DiT for one image (C, H, W), patch by patch."""
    weights, config = model.state_dict(), model.config
    p, side = config.patch_size, config.input_size // config.patch_size
    corners = [(row * p, column * p) for row in range(side) for column in range(side)]
    tokens = torch.stack([x[:, i : i + p, j : j + p].flatten() for i, j in corners])
    tokens = tokens @ weights["x_embedder.proj.weight"].flatten(1).T + weights["x_embedder.proj.bias"]
    tokens = tokens + weights["pos_embed"][0]
    phase = torch.tensor([t / 10_000 ** (i / 128) for i in range(128)], dtype=torch.float64)
    hidden = F.linear(
        torch.cat([phase.cos(), phase.sin()]), weights["t_embedder.mlp.0.weight"], weights["t_embedder.mlp.0.bias"]
    )
    c = F.linear(hidden * hidden.sigmoid(), weights["t_embedder.mlp.2.weight"], weights["t_embedder.mlp.2.bias"])
    c = c + weights["y_embedder.embedding_table.weight"][y]
    for index in range(config.depth):
        tokens = slow_block(weights, f"blocks.{index}", tokens, c, config.num_heads)
    modulation = "final_layer.adaLN_modulation.1"
    modulated = F.linear(c * c.sigmoid(), weights[f"{modulation}.weight"], weights[f"{modulation}.bias"])
    shift, scale = modulated.split(config.hidden_size)
    normed = F.layer_norm(tokens, (config.hidden_size,), eps=1e-6) * (1 + scale) + shift
    patches = F.linear(normed, weights["final_layer.linear.weight"], weights["final_layer.linear.bias"])
    image = x.new_zeros(config.out_channels, config.input_size, config.input_size)
    for (i, j), patch in zip(corners, patches, strict=True):
        image[:, i : i + p, j : j + p] = patch.view(p, p, config.out_channels).permute(2, 0, 1)
    return image


@pytest.mark.parametrize("overrides", [{}, {"patch_size": 4, "in_channels": 1, "learn_sigma": False, "mlp_ratio": 2.0}])
def test_forward_is_the_slow_one(overrides: dict) -> None:
    model = shaken(small_config(**overrides))
    x, _, y = inputs(model.config)
    t = torch.tensor([0, 1, 2])  # small, so that the float32 phase of the timestep embedding is exact to 1e-7
    output = model(x, t, y)
    for b in range(len(x)):
        expected = slow_forward(model, x[b], int(t[b]), int(y[b]))
        torch.testing.assert_close(output[b], expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_state_dict_has_the_published_keys() -> None:
    keys = set(DiT(small_config(depth=1)).state_dict())
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    layers += ["final_layer.adaLN_modulation.1"]
    layers += [f"blocks.0.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert keys == expected | {"pos_embed", "y_embedder.embedding_table.weight"}


@pytest.mark.parametrize("preset", PUBLISHED_MILLIONS)
def test_published_sizes(preset: str) -> None:
    with torch.device("meta"):
        model = DiT(dit_config(preset, input_size=32, in_channels=4, num_classes=1000))
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert weights / 1e6 == pytest.approx(PUBLISHED_MILLIONS[preset], abs=1.0)


def test_all_presets_build() -> None:
    published = {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)}
    small = {f"DiT-{size}/{patch}" for size in ("Ti", "Mi") for patch in (1, 2, 4)}
    assert set(DIT_PRESETS) == published | small
    for preset in DIT_PRESETS:
        assert dit_config(preset, input_size=32, in_channels=4).patch_size == int(preset.rpartition("/")[2])
    model = DiT(dit_config("DiT-Ti/2", input_size=8, in_channels=1, num_classes=10, learn_sigma=False))
    assert (model.hidden_size, len(model.blocks)) == (64, 4)


def test_initial_model_is_the_identity_with_output_zero() -> None:
    torch.manual_seed(0)
    model = DiT(small_config())
    x, t, y = (value.float() if value.is_floating_point() else value for value in inputs(model.config))
    assert (model(x, t, y) == 0).all()
    tokens, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    torch.testing.assert_close(model.blocks[0](tokens, c), tokens, rtol=0, atol=0)


def test_initial_scales() -> None:
    torch.manual_seed(0)
    model = DiT(small_config(hidden_size=256, num_classes=100))
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.get_parameter("y_embedder.embedding_table.weight").std().item() == pytest.approx(0.02, rel=0.05)
    fan_in, fan_out = 3 * 2 * 2, 256  # of the patch embedding, seen as a linear layer
    bound = math.sqrt(6 / (fan_in + fan_out))
    projection = model.x_embedder.proj.weight
    assert projection.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert all((bias == 0).all() for name, bias in model.named_parameters() if name.endswith("bias"))


def test_position_embedding_is_fixed_and_distinguishes_rows_from_columns() -> None:
    model = DiT(small_config())
    assert not model.pos_embed.requires_grad
    grid = position_embedding(32, 4)[0].view(4, 4, 32)
    for row, column, i in ((0, 3, 5), (2, 1, 0), (3, 3, 7)):
        frequency = 10_000 ** (-i / 8)
        expected = [wave(axis * frequency) for axis in (column, row) for wave in (math.sin, math.cos)]
        torch.testing.assert_close(grid[row, column, i::8], torch.tensor(expected))


def test_timestep_embedding_stays_float32_and_takes_continuous_timesteps() -> None:
    embedding = timestep_embedding(torch.tensor([0.0, 7.5, 999.0], dtype=torch.float64))
    assert embedding.dtype == torch.float32
    assert (embedding[0] == torch.cat([torch.ones(128), torch.zeros(128)])).all()
    assert embedding[1, 0].item() == pytest.approx(math.cos(7.5))
    assert embedding[1, 128].item() == pytest.approx(math.sin(7.5))
    model = shaken(small_config())
    x, t, y = inputs(model.config)
    torch.testing.assert_close(model(x, t, y), model(x, t.double(), y), rtol=0, atol=0)
    assert not torch.equal(model(x, t, y), model(x, t + 0.5, y))
    half = DiT(small_config()).bfloat16()
    assert half(x.bfloat16(), t, y).dtype == torch.bfloat16


def test_routing_with_beta_one_is_the_plain_model_bit_for_bit() -> None:
    model = shaken(small_config())
    x, t, y = inputs(model.config)
    plain = model(x, t, y)
    route(model, MaskConfig(beta=1.0))
    assert torch.equal(model(x, t, y), plain)
    unroute(model)
    assert torch.equal(model(x, t, y), plain)


@pytest.mark.parametrize("kind", ["dtr", "random", "cluster", "learned"])
def test_routed_forward_masks_what_each_block_reads(kind: str) -> None:
    model = shaken(small_config())
    x, t, y = inputs(model.config)
    plain = model(x, t, y)
    keys = set(model.state_dict())
    routing = route(model, MaskConfig(kind=kind, beta=0.5, per_block=kind != "dtr", clusters=2))
    assert {key for key in model.state_dict() if not key.startswith("routing.learned.")} == keys
    c = model.t_embedder(t) + model.y_embedder(y)
    tokens = model.x_embedder(x) + model.pos_embed
    for index, block in enumerate(model.blocks):
        mask = torch.from_numpy(routing.block_masks(index))[t][:, None].double()
        tokens = tokens + block(mask * tokens, c) - mask * tokens
    expected = model.final_layer(tokens, c)
    image = model(x, t, y)
    torch.testing.assert_close(image[:, :, :2, :2].permute(0, 2, 3, 1).flatten(1), expected[:, 0])
    assert not torch.allclose(image, plain)


def test_unconditional_model() -> None:
    model = shaken(small_config(num_classes=0))
    x, t, y = inputs(model.config)
    assert not [key for key in model.state_dict() if key.startswith("y_embedder")]
    assert model(x, t).shape == (3, 6, 8, 8)
    with pytest.raises(ValueError, match="unconditional"):
        model(x, t, y)
    with pytest.raises(ValueError, match="no null class"):
        _ = model.null_class


def test_labels_are_required_of_a_conditional_model() -> None:
    model = shaken(small_config())
    x, t, _ = inputs(model.config)
    with pytest.raises(ValueError, match="conditional on 5 classes"):
        model(x, t)


def test_table_has_a_null_row_only_with_label_dropout() -> None:
    with_null, without = DiT(small_config()), DiT(small_config(label_dropout=0.0))
    assert len(with_null.get_parameter("y_embedder.embedding_table.weight")) == 6
    assert len(without.get_parameter("y_embedder.embedding_table.weight")) == 5
    assert with_null.null_class == 5
    with pytest.raises(ValueError, match="label_dropout > 0"):
        _ = without.null_class


def test_label_dropout_is_explicit_and_seeded() -> None:
    model = DiT(small_config(label_dropout=0.3))
    y = torch.arange(10_000) % 5
    dropped = model.drop_labels(y, torch.Generator().manual_seed(0))
    assert (dropped == 5).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert (dropped[dropped != 5] == y[dropped != 5]).all()
    assert torch.equal(dropped, model.drop_labels(y, torch.Generator().manual_seed(0)))
    assert DiT(small_config(label_dropout=0.0)).drop_labels(y) is y


def test_wrong_input_shape_is_an_error() -> None:
    model = shaken(small_config())
    x, t, y = inputs(model.config)
    with pytest.raises(ValueError, match=r"shape \(B, 3, 8, 8\)"):
        model(x[..., :4], t, y)


@pytest.mark.parametrize(
    ("overrides", "culprit"),
    [
        ({"patch_size": 3}, "patch_size 3 does not divide input_size 8"),
        ({"hidden_size": 34}, "hidden_size 34 must be a multiple of 4"),
        ({"hidden_size": 30, "num_heads": 3}, "multiple of 4"),
        ({"num_heads": 5}, "multiple of 5"),
        ({"depth": 0}, "depth is 0"),
        ({"label_dropout": 1.0}, "label_dropout is 1.0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
    ],
)
def test_config_errors_name_the_culprit(overrides: dict, culprit: str) -> None:
    with pytest.raises(UserInputError, match=culprit):
        small_config(**overrides)


def test_preset_errors_name_the_culprit() -> None:
    with pytest.raises(UserInputError, match="unknown DiT preset 'DiT-G/2': choose one of DiT-XL/2"):
        dit_config("DiT-G/2", input_size=32, in_channels=4)
    with pytest.raises(UserInputError, match="unknown DiT setting width"):
        dit_config("DiT-S/2", input_size=32, in_channels=4, width=3)
    with pytest.raises(UserInputError, match="needs a value for in_channels"):
        dit_config("DiT-S/2", input_size=32)
