"""ADM's U-Net written out for one image at a time, after Dhariwal & Nichol (2021) and Nichol & Dhariwal (2021).

Holds what `test_unet.py` cannot: that diffusers' network, as it is configured here, is ADM's.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_modules.backbones.unet import UNet, UNetConfig
from lightning_modules.routing import MaskConfig, route


class SlowADM:
    """The forward pass of one image (C, H, W), from a state dict."""

    def __init__(self, model: UNet, masks: dict[str, Tensor]) -> None:
        self.weights, self.config, self.masks = model.state_dict(), model.config, masks

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].flatten(1).T + self.weights[f"{name}.bias"]

    def conv(self, name: str, x: Tensor) -> Tensor:
        """A 3 x 3 convolution as a matrix product over the nine shifted images."""
        _, height, width = x.shape
        padded = F.pad(x, (1, 1, 1, 1))
        shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return self.pointwise(name, torch.stack(shifted, dim=1).flatten(0, 1))

    def pointwise(self, name: str, x: Tensor) -> Tensor:
        return self.linear(name, x.flatten(1).T).T.reshape(-1, *x.shape[1:])

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(self.config.norm_groups, -1)
        centred = groups - groups.mean(1, keepdim=True)
        normed = (centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()).view_as(x)
        return normed * self.weights[f"{name}.weight"][:, None, None] + self.weights[f"{name}.bias"][:, None, None]

    def residual(self, name: str, x: Tensor, emb: Tensor, resample=lambda x: x) -> Tensor:
        h = x * self.masks[name][:, None, None] if name in self.masks else x
        h = self.norm(f"{name}.norm1", h)
        h = self.conv(f"{name}.conv1", resample(h * h.sigmoid()))
        scale, shift = self.linear(f"{name}.time_emb_proj", emb * emb.sigmoid()).view(2, -1, 1, 1)
        h = self.norm(f"{name}.norm2", h) * (1 + scale) + shift
        h = self.conv(f"{name}.conv2", h * h.sigmoid())
        x = resample(x)
        return h + (x if len(x) == len(h) else self.pointwise(f"{name}.conv_shortcut", x))

    def attention(self, name: str, x: Tensor) -> Tensor:
        normed = self.norm(f"{name}.group_norm", x).flatten(1).T
        q, k, v = (self.linear(f"{name}.to_{part}", normed) for part in "qkv")
        width = self.config.head_channels
        heads = [slice(start, start + width) for start in range(0, len(x), width)]
        mixed = [(q[:, head] @ k[:, head].T / math.sqrt(width)).softmax(1) @ v[:, head] for head in heads]
        return x + self.linear(f"{name}.to_out.0", torch.cat(mixed, dim=1)).T.view_as(x)

    def embed(self, t: int, y: int) -> Tensor:
        half = self.config.channels // 2
        phase = torch.tensor([t / 10_000 ** (i / half) for i in range(half)], dtype=torch.float64)
        hidden = self.linear("time_embedding.linear_1", torch.cat([phase.cos(), phase.sin()]))
        emb = self.linear("time_embedding.linear_2", hidden * hidden.sigmoid())
        return emb + self.weights["class_embedding.weight"][y]

    def __call__(self, x: Tensor, t: int, y: int) -> Tensor:
        config, emb = self.config, self.embed(t, y)
        h = self.conv("conv_in", x)
        levels, encoded = len(config.channel_mult), [h]
        attends = [resolution in config.attention_resolutions for resolution in config.resolutions]
        for level in range(levels):
            for place in range(config.num_res_blocks):
                h = self.residual(f"down_blocks.{level}.resnets.{place}", h, emb)
                h = self.attention(f"down_blocks.{level}.attentions.{place}", h) if attends[level] else h
                encoded.append(h)
            if level < levels - 1:
                h = self.residual(f"down_blocks.{level}.downsamplers.0", h, emb, halved)
                encoded.append(h)
        h = self.residual("mid_block.resnets.0", h, emb)
        h = self.residual("mid_block.resnets.1", self.attention("mid_block.attentions.0", h), emb)
        for stage, level in enumerate(reversed(range(levels))):
            for place in range(config.num_res_blocks + 1):
                h = self.residual(f"up_blocks.{stage}.resnets.{place}", torch.cat([h, encoded.pop()]), emb)
                h = self.attention(f"up_blocks.{stage}.attentions.{place}", h) if attends[level] else h
            if level:
                h = self.residual(f"up_blocks.{stage}.upsamplers.0", h, emb, doubled)
        h = self.norm("conv_norm_out", h)
        return self.conv("conv_out", h * h.sigmoid())


def halved(x: Tensor) -> Tensor:
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


@pytest.mark.parametrize("routing", [None, MaskConfig(alpha=1, beta=0.5)])
@pytest.mark.parametrize("attention", [(4,), (8, 2)])
def test_the_network_is_adms(attention, routing):
    config = UNetConfig(8, 3, 8, (1, 2, 3), 2, attention, head_channels=8, norm_groups=4, num_classes=5)
    torch.manual_seed(0)
    model = UNet(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x, t, y = torch.randn(2, 3, 8, 8).double(), torch.tensor([700, 3]), torch.tensor([5, 2])
    masks: list[dict[str, Tensor]] = [{}, {}]
    if routing is not None:
        at_t = [mask.double() for mask in route(model, routing)(t)]
        masks = [{name: mask[i] for name, mask in zip(model.block_channels, at_t, strict=True)} for i in range(2)]
    output = model(x, t, y)
    for i in range(2):
        expected = SlowADM(model, masks[i])(x[i], int(t[i]), int(y[i]))
        # The model embeds timesteps in float32, as ADM does.
        torch.testing.assert_close(output[i], expected, rtol=1e-4, atol=1e-4)
