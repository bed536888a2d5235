"""Configuration of a DiT, and the named sizes.

S, B, L and XL are the published ones (Peebles & Xie, 2023, table 1). Mi and Ti are ours, for images of digits' and
CIFAR's size on a CPU; their patch size 1 is for 8 x 8 images.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from lightning_modules.backbones.backbone import BackboneConfig, named_config
from lightning_modules.errors import UserInputError


@dataclasses.dataclass(frozen=True)
class DiTConfig(BackboneConfig):
    """Shape of a DiT.

    Attributes:
        input_size: Height and width of the images or latents.
        patch_size: Height and width of a token's patch; divides ``input_size``.
        in_channels: Channels of the images or latents.
        hidden_size: Channels of the residual stream; a multiple of 4 and of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Inner width of the MLP over ``hidden_size``.
        num_classes: Number of classes; 0 for an unconditional model.
        label_dropout: Share of labels to replace by the null class in training, in [0, 1). Above 0 the embedding table
            has one more row, for the null class, which classifier-free guidance needs.
        learn_sigma: Whether the model also predicts the variance, in as many further channels.
        kind: Tells the settings of a DiT from those of other backbones; need not be written.

    Raises:
        UserInputError: If a value is out of range or does not fit the others.
    """

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_classes: int = 0
    label_dropout: float = 0.1
    learn_sigma: bool = True
    kind: Literal["dit"] = "dit"

    def __post_init__(self) -> None:
        if self.kind != "dit":
            raise UserInputError(f"backbone kind {self.kind!r} does not fit the settings of a DiT")
        self._check_positive("DiT", "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
        if self.input_size % self.patch_size:
            raise UserInputError(
                f"patch_size {self.patch_size} does not divide input_size {self.input_size}: choose a patch size "
                "that does, or resize the images"
            )
        for divisor, reason in ((self.num_heads, "num_heads"), (4, "the position embedding's 4 parts")):
            if self.hidden_size % divisor:
                raise UserInputError(f"hidden_size {self.hidden_size} must be a multiple of {divisor} ({reason})")
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise UserInputError(f"mlp_ratio is {self.mlp_ratio}: the MLP needs at least one channel")
        self._check_labels()


_SIZES = {
    "XL": ({"hidden_size": 1152, "depth": 28, "num_heads": 16}, (2, 4, 8)),
    "L": ({"hidden_size": 1024, "depth": 24, "num_heads": 16}, (2, 4, 8)),
    "B": ({"hidden_size": 768, "depth": 12, "num_heads": 12}, (2, 4, 8)),
    "S": ({"hidden_size": 384, "depth": 12, "num_heads": 6}, (2, 4, 8)),
    "Mi": ({"hidden_size": 128, "depth": 6, "num_heads": 4}, (1, 2, 4)),
    "Ti": ({"hidden_size": 64, "depth": 4, "num_heads": 4}, (1, 2, 4)),
}

DIT_PRESETS: dict[str, dict[str, int]] = {
    f"DiT-{name}/{patch_size}": {**size, "patch_size": patch_size}
    for name, (size, patch_sizes) in _SIZES.items()
    for patch_size in patch_sizes
}
"""``hidden_size``, ``depth``, ``num_heads`` and ``patch_size`` by name, such as ``"DiT-XL/2"``."""


def dit_config(preset: str, **overrides: Any) -> DiTConfig:
    """The configuration of a named size.

    Args:
        preset: A key of `DIT_PRESETS`.
        **overrides: Fields of `DiTConfig`; ``input_size`` and ``in_channels`` are required.

    Raises:
        UserInputError: For an unknown preset or field, a missing field, or a value out of range.
    """
    return named_config("DiT", DiTConfig, DIT_PRESETS, preset, overrides)
