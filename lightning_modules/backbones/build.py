"""From the settings of any backbone to the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_modules.backbones.backbone import Backbone
from lightning_modules.backbones.dit import DiT, DiTConfig
from lightning_modules.backbones.unet_config import UNetConfig
from lightning_modules.errors import UserInputError

_CONFIGS: dict[str, type[DiTConfig | UNetConfig]] = {"dit": DiTConfig, "unet": UNetConfig}


def build_backbone(config: DiTConfig | UNetConfig) -> Backbone:
    """The network of the given settings, with fresh weights."""
    if isinstance(config, DiTConfig):
        return DiT(config)
    from lightning_modules.backbones.unet import UNet  # imports diffusers, which takes longer than most checks

    return UNet(config)


def backbone_config(settings: Mapping[str, Any]) -> DiTConfig | UNetConfig:
    """The settings that a checkpoint stores, as written by `dataclasses.asdict`.

    Checkpoints of the time before there were U-Nets do not name the ``kind``: they are DiTs.

    Raises:
        UserInputError: For an unknown kind, or values out of range.
        TypeError: For unknown or missing settings.
    """
    kind = settings.get("kind", "dit")
    if kind not in _CONFIGS:
        raise UserInputError(f"unknown backbone kind {kind!r}: choose one of {', '.join(_CONFIGS)}")
    return _CONFIGS[kind](**settings)
