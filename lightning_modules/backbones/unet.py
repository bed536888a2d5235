"""ADM's U-Net for pixels on diffusers' `UNet2DModel`, with room for task routing.

Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021, arXiv 2105.05233). State-dict keys are those
of diffusers' `UNet2DModel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_modules.backbones.backbone import Backbone, BranchObserver, StreamObserver
from lightning_modules.backbones.unet_config import UNET_PRESETS, UNetConfig, unet_config

__all__ = ["UNET_PRESETS", "ResidualBlock", "UNet", "UNetConfig", "unet_config"]


class ResidualBlock(nn.Module):
    """ADM's residual block, made of the parts of diffusers' `ResnetBlock2D`: S(x) + F(m * x, conditioning).

    F normalises, resamples where the block changes the resolution, convolves, normalises and modulates by the
    conditioning, and convolves again. The skip S resamples alike and projects where the number of channels changes; it
    sees all channels, routed or not, which is what diffusers' block leaves no room for.

    Attributes:
        index: Place among the network's residual blocks.
        channels: Channels that the branch reads.
    """

    norm1: nn.Module
    conv1: nn.Module
    time_emb_proj: nn.Module
    norm2: nn.Module
    dropout: nn.Module
    conv2: nn.Module
    nonlinearity: nn.Module
    conv_shortcut: nn.Module | None

    def __init__(self, block: ResnetBlock2D, index: int) -> None:
        super().__init__()
        self.index = index
        self.channels = block.in_channels
        for name in ("norm1", "conv1", "time_emb_proj", "norm2", "dropout", "conv2", "nonlinearity", "conv_shortcut"):
            setattr(self, name, getattr(block, name))
        self.resample = block.upsample if block.up else block.downsample

    def forward(self, x: Tensor, conditioning: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), conditioning (B, D), mask (B, C) or None -> (B, C_out, H_out, W_out)."""
        h = x if mask is None else mask[:, :, None, None].to(x.dtype) * x
        h = self.nonlinearity(self.norm1(h))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)
        scale, shift = self.time_emb_proj(self.nonlinearity(conditioning))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(self.nonlinearity(h)))
        if self.conv_shortcut is not None:
            # Attention leaves pixels strided, and so would be this layer's gradient, which DDP then has to copy.
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return x + h


class UNet(Backbone):
    """ADM's U-Net: residual blocks with adaptive group normalisation that also change the resolution, and attention.

    The layers are diffusers'; the walk through them is written out here, because masks must reach each residual block.
    Compared with the authors' code (guided-diffusion), the same function with these differences:

    - attention keeps separate projections for query, key and value, and always splits into heads of ``head_channels``
      channels (the published ADM-128 has 4 heads at every width, which changes no shape);
    - nothing is computed in float16 unless the trainer's precision says so;
    - widths are multiples of ``channels``, so the published 512 x 512 model, whose first level is half as wide as its
      time embedding, has no preset;
    - there may be a null class, which ADM lacks, in the last row of the class embedding.

    Routing masks what the branch of each residual block reads, those that change the resolution included; the skip
    carries all channels. DTR's authors released no U-Net code, so two choices are ours. Attention is not routed: what
    ADM calls a residual block comes before it. And on the way up, where a block reads the previous block's channels
    followed by those of the encoder, one window lies over all the C channels that it reads (the paper's z^l in R^C).
    """

    config: UNetConfig
    conv_in: nn.Conv2d
    time_proj: nn.Module
    time_embedding: nn.Module
    class_embedding: nn.Module
    down_blocks: Any
    mid_block: Any
    up_blocks: Any
    conv_norm_out: nn.Module
    conv_act: nn.Module
    conv_out: nn.Module

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.routing = None
        for name, child in _diffusers_unet(config).named_children():
            self.add_module(name, child)
        for index, (blocks, place) in enumerate(list(self._places())):
            blocks[place] = ResidualBlock(blocks[place], index)  # type: ignore[arg-type]
        self._initialize()

    def _places(self) -> Iterator[tuple[nn.ModuleList, int]]:
        """Where the residual blocks are, in network order: the list and the place in it."""
        for stage in (*self.down_blocks, self.mid_block, *self.up_blocks):
            for name in ("resnets", "downsamplers", "upsamplers"):
                blocks = getattr(stage, name, None)
                if blocks is not None:
                    yield from ((blocks, place) for place in range(len(blocks)))

    def _initialize(self) -> None:
        """ADM's initialisation: every branch, and the model's output, starts as zero; PyTorch's defaults elsewhere."""
        for name, parameter in self.named_parameters():
            if name.rsplit(".", 1)[0].endswith((".conv2", ".to_out.0")) or name.startswith("conv_out."):
                nn.init.zeros_(parameter)

    def _residual_blocks(self) -> dict[str, ResidualBlock]:
        return {name: module for name, module in self.named_modules() if isinstance(module, ResidualBlock)}

    @property
    def block_channels(self) -> dict[str, int]:
        """Module path of each residual block -> channels that its branch reads, in network order."""
        blocks = sorted(self._residual_blocks().items(), key=lambda item: item[1].index)
        return {name: block.channels for name, block in blocks}

    def observe_branches(self, observer: BranchObserver) -> list[RemovableHandle]:
        """Shows what each branch's first layer reads (masked) and what its last one gives."""
        handles = []
        for name, block in self._residual_blocks().items():
            handles.append(block.norm1.register_forward_pre_hook(_input_listener(observer, name)))
            handles.append(block.conv2.register_forward_hook(_update_listener(observer, name)))
        return handles

    def observe_streams(self, observer: StreamObserver) -> list[RemovableHandle]:
        """Shows what each residual block puts out, skip and branch together, before attention."""

        def listener(name: str) -> Any:
            def listen(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
                observer(name, _pixels(output))

            return listen

        return [block.register_forward_hook(listener(name)) for name, block in self._residual_blocks().items()]

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts the diffusion's target, and the variance values if ``learn_sigma``.

        Args:
            x: Noised images ``(B, C, H, W)``.
            t: Timesteps ``(B,)``, integer or continuous.
            y: Class labels ``(B,)``, int64, the null class included; None for an unconditional model.

        Returns:
            ``(B, C, H, W)``, or ``(B, 2C, H, W)`` if ``learn_sigma``.

        Raises:
            ValueError: If the input's shape is not the configured one, or labels are missing or superfluous.
        """
        self._check_inputs(x, y)
        conditioning = self.time_embedding(self.time_proj(t).to(self.conv_in.weight.dtype))
        if y is not None:
            conditioning = conditioning + self.class_embedding(y)
        masks = None if self.routing is None else self.routing(t)

        def residual(block: ResidualBlock, h: Tensor) -> Tensor:
            return block(h, conditioning, None if masks is None else masks[block.index])

        h = self.conv_in(x)
        encoded = [h]
        for stage in self.down_blocks:
            for place, block in enumerate(stage.resnets):
                h = _attend(stage, place, residual(block, h))
                encoded.append(h)
            for block in stage.downsamplers or ():
                h = residual(block, h)
                encoded.append(h)
        first, last = self.mid_block.resnets
        h = residual(last, _attend(self.mid_block, 0, residual(first, h)))
        for stage in self.up_blocks:
            for place, block in enumerate(stage.resnets):
                h = _attend(stage, place, residual(block, torch.cat([h, encoded.pop()], dim=1)))
            for block in stage.upsamplers or ():
                h = residual(block, h)
        return self.conv_out(self.conv_act(self.conv_norm_out(h)))


def _attend(stage: Any, place: int, h: Tensor) -> Tensor:
    """Attention after a stage's residual block, where there is one; images (B, C, H, W) in and out."""
    attentions = getattr(stage, "attentions", None)
    return h if attentions is None else attentions[place](h)


def _input_listener(observer: BranchObserver, block: str) -> Any:
    def listen(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001
        observer(block, "input", _pixels(args[0]))

    return listen


def _update_listener(observer: BranchObserver, block: str) -> Any:
    def listen(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        observer(block, "update", _pixels(output))

    return listen


def _pixels(images: Tensor) -> Tensor:
    """Images (B, C, H, W) -> one row of channels per pixel (B, H W, C), detached, in float32."""
    return images.detach().float().flatten(2).transpose(1, 2)


def _diffusers_unet(config: UNetConfig) -> UNet2DModel:
    """diffusers' network of the same shape."""
    attends = [resolution in config.attention_resolutions for resolution in config.resolutions]
    return UNet2DModel(
        sample_size=config.input_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if each else "ResnetDownsampleBlock2D" for each in attends),
        up_block_types=tuple("AttnUpBlock2D" if each else "ResnetUpsampleBlock2D" for each in reversed(attends)),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=config.head_channels,
        norm_num_groups=config.norm_groups,
        attn_norm_num_groups=config.norm_groups,
        dropout=config.dropout,
        num_class_embeds=config.num_classes + config.has_null_class or None,
    )
