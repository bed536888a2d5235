"""Configuration of a U-Net, and the named sizes.

ADM-64, ADM-128 and ADM-256 are the class-conditional ImageNet models of Dhariwal & Nichol, "Diffusion Models Beat GANs
on Image Synthesis" (2021, arXiv 2105.05233), as the flags in their repository's README give them. ADM-256-light is the
93 M variant on which Choi et al. (P2, CVPR 2022) and others train FFHQ. UNet-32 and UNet-8 are ours, for images of
CIFAR's and digits' size on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from lightning_modules.backbones.backbone import BackboneConfig, named_config
from lightning_modules.errors import UserInputError


@dataclasses.dataclass(frozen=True)
class UNetConfig(BackboneConfig):
    """Shape of a U-Net.

    Attributes:
        input_size: Height and width of the images; halved once per level, so divisible by 2^(levels - 1).
        in_channels: Channels of the images or latents.
        channels: Channels of the first level.
        channel_mult: Channels of each level over ``channels``, from the input's resolution downwards.
        num_res_blocks: Residual blocks per level on the way down; one more on the way up.
        attention_resolutions: Heights at which every residual block is followed by attention, such as 32, 16, 8; the
            middle of the network has attention in any case.
        head_channels: Channels of an attention head.
        norm_groups: Groups of the group norms; divides the channels of every level.
        dropout: Dropout inside the residual branches, in [0, 1).
        num_classes: Number of classes; 0 for an unconditional model.
        label_dropout: Share of labels to replace by the null class in training, in [0, 1). Above 0 the embedding table
            has one more row, for the null class, which classifier-free guidance needs.
        learn_sigma: Whether the model also predicts the variance, in as many further channels.
        kind: Tells the settings of a U-Net from those of other backbones; need not be written.

    Raises:
        UserInputError: If a value is out of range or does not fit the others.
    """

    input_size: int
    in_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    head_channels: int = 64
    norm_groups: int = 32
    dropout: float = 0.0
    num_classes: int = 0
    label_dropout: float = 0.1
    learn_sigma: bool = True
    kind: Literal["unet"] = "unet"

    def __post_init__(self) -> None:
        if self.kind != "unet":
            raise UserInputError(f"backbone kind {self.kind!r} does not fit the settings of a U-Net")
        for field in ("channel_mult", "attention_resolutions"):
            values = getattr(self, field)
            if not isinstance(values, Sequence) or not all(isinstance(value, int) and value > 0 for value in values):
                raise UserInputError(f"{field} is {values!r}: it must be a list of positive integers")
            object.__setattr__(self, field, tuple(values))  # lists come from YAML and JSON
        self._check_positive(
            "U-Net", "input_size", "in_channels", "channels", "num_res_blocks", "head_channels", "norm_groups"
        )
        if not 0 <= self.dropout < 1:
            raise UserInputError(f"dropout is {self.dropout}: it must lie in [0, 1)")
        self._check_labels()
        self._check_levels()

    def _check_levels(self) -> None:
        if not self.channel_mult:
            raise UserInputError("channel_mult is empty: it needs one entry for each level of the U-Net")
        halvings = len(self.channel_mult) - 1
        if self.input_size % 2**halvings:
            raise UserInputError(
                f"input_size {self.input_size} cannot be halved {halvings} times, as the {len(self.channel_mult)} "
                "levels of channel_mult need: shorten channel_mult, or resize the images"
            )
        if foreign := sorted(set(self.attention_resolutions) - set(self.resolutions)):
            raise UserInputError(
                f"attention_resolutions names {', '.join(map(str, foreign))}, but the U-Net's levels have the "
                f"resolutions {', '.join(map(str, self.resolutions))}"
            )
        for level, width in enumerate(self.widths):
            if width % self.norm_groups:
                raise UserInputError(
                    f"level {level} has {width} channels, no multiple of norm_groups {self.norm_groups}: change "
                    "channels, channel_mult or norm_groups"
                )
            attends = self.resolutions[level] in self.attention_resolutions or level == halvings
            if attends and width % self.head_channels:
                raise UserInputError(
                    f"level {level} has attention and {width} channels, no multiple of head_channels "
                    f"{self.head_channels}: change channels, channel_mult or head_channels"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * factor for factor in self.channel_mult)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Height of each level's images."""
        return tuple(self.input_size // 2**level for level in range(len(self.channel_mult)))


UNET_PRESETS: dict[str, dict[str, Any]] = {
    "ADM-64": {"input_size": 64, "channels": 192, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3, "dropout": 0.1},
    "ADM-128": {"input_size": 128, "channels": 256, "channel_mult": (1, 1, 2, 3, 4)},
    "ADM-256": {"input_size": 256, "channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4)},
    "ADM-256-light": {
        "input_size": 256,
        "channels": 128,
        "channel_mult": (1, 1, 2, 2, 4, 4),
        "num_res_blocks": 1,
        "attention_resolutions": (16,),
    },
    "UNet-32": {
        "input_size": 32,
        "channels": 64,
        "channel_mult": (1, 2, 2),
        "num_res_blocks": 2,
        "attention_resolutions": (16, 8),
        "head_channels": 32,
        "norm_groups": 16,
    },
    "UNet-8": {
        "input_size": 8,
        "channels": 24,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "head_channels": 24,
        "norm_groups": 8,
    },
}
"""Settings by name, such as ``"ADM-64"``; ``in_channels`` and the classes are left to the user."""


def unet_config(preset: str, **overrides: Any) -> UNetConfig:
    """The configuration of a named size.

    Args:
        preset: A key of `UNET_PRESETS`.
        **overrides: Fields of `UNetConfig`; ``in_channels`` is required.

    Raises:
        UserInputError: For an unknown preset or field, a missing field, or a value out of range.
    """
    return named_config("U-Net", UNetConfig, UNET_PRESETS, preset, overrides)
