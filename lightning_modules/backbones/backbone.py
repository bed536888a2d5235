"""What every backbone has in common: its settings, labels with a null class, and sites that routing and probes use."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_modules.errors import UserInputError
from lightning_modules.routing import ChannelRouting

_Config = TypeVar("_Config", bound="BackboneConfig")


class BackboneConfig:
    """What the settings of all backbones share; the fields themselves are those of the dataclasses derived from it.

    Attributes:
        input_size: Height and width of the images or latents.
        in_channels: Channels of the images or latents.
        num_classes: Number of classes; 0 for an unconditional model.
        label_dropout: Share of labels to replace by the null class in training, in [0, 1).
        learn_sigma: Whether the model also predicts the variance, in as many further channels.
    """

    input_size: int
    in_channels: int
    num_classes: int
    label_dropout: float
    learn_sigma: bool

    @property
    def out_channels(self) -> int:
        """Channels of the model's output."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def has_null_class(self) -> bool:
        """Whether there is a null class, for label dropout and classifier-free guidance."""
        return self.num_classes > 0 and self.label_dropout > 0

    def _check_positive(self, kind: str, *fields: str) -> None:
        for field in fields:
            if getattr(self, field) < 1:
                raise UserInputError(f"{kind} {field} is {getattr(self, field)}: it must be at least 1")

    def _check_labels(self) -> None:
        if self.num_classes < 0:
            raise UserInputError(f"num_classes is {self.num_classes}: use 0 for an unconditional model")
        if not 0 <= self.label_dropout < 1:
            raise UserInputError(f"label_dropout is {self.label_dropout}: it must lie in [0, 1)")


class BranchObserver(Protocol):
    """Is shown what the residual branches of a block read and add."""

    def __call__(self, block: str, site: str, values: Tensor) -> None:
        """Block by module path, ``"input"`` or ``"update"``, and values (B, N, C): N tokens or pixels, detached."""


class StreamObserver(Protocol):
    """Is shown the residual stream behind each block."""

    def __call__(self, block: str, values: Tensor, /) -> None:
        """Block by module path, and values (B, N, C): N tokens or pixels with all their channels, detached."""


class Backbone(nn.Module, abc.ABC):
    """A denoising network: noised data (B, C, H, W), timesteps (B,), labels (B,) -> (B, C or 2C, H, W).

    Attributes:
        config: Its settings.
        routing: Task routing of the residual blocks, or None for the plain model; see `lightning_modules.routing`.
    """

    config: BackboneConfig
    routing: ChannelRouting | None

    @property
    @abc.abstractmethod
    def block_channels(self) -> dict[str, int]:
        """Module path of each residual block -> channels that its branch reads, in network order."""

    @abc.abstractmethod
    def observe_branches(self, observer: BranchObserver) -> list[RemovableHandle]:
        """Shows every forward pass's residual branches to ``observer``, until the handles are removed."""

    @abc.abstractmethod
    def observe_streams(self, observer: StreamObserver) -> list[RemovableHandle]:
        """Shows every forward pass's residual stream behind each block to ``observer``, until the handles are removed.

        That is z^{l+1}, what the next block reads before any mask.
        """

    @property
    def null_class(self) -> int:
        """The label that stands for "no class".

        Raises:
            ValueError: If the model has none.
        """
        if not self.config.has_null_class:
            raise ValueError(
                f"this {type(self).__name__} has no null class, so labels cannot be dropped and guidance is "
                "impossible: it needs num_classes > 0 and label_dropout > 0"
            )
        return self.config.num_classes

    def drop_labels(self, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Replaces a share of ``label_dropout`` of the labels by the null class.

        Dropping is explicit, never hidden in the forward pass, so that a step can be repeated exactly.

        Args:
            y: Labels ``(B,)``.
            generator: Source of randomness on the device of ``y``.

        Returns:
            Labels ``(B,)``; ``y`` itself where ``label_dropout`` is 0.
        """
        if self.config.label_dropout == 0:
            return y
        dropped = torch.rand(y.shape, generator=generator, device=y.device) < self.config.label_dropout
        return torch.where(dropped, self.null_class, y)

    def _check_inputs(self, x: Tensor, y: Tensor | None) -> None:
        """Raises ValueError if data (B, C, H, W) or labels (B,) are not what the configuration says."""
        name, config = type(self).__name__, self.config
        expected = (config.in_channels, config.input_size, config.input_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"this {name} takes inputs of shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}"
            )
        if config.num_classes == 0 and y is not None:
            raise ValueError(f"this {name} is unconditional (num_classes = 0), but labels y were given")
        if config.num_classes > 0 and y is None:
            raise ValueError(
                f"this {name} is conditional on {config.num_classes} classes, but no labels y were given: "
                "pass null_class for samples without a class"
            )


def named_config(
    family: str,
    config: type[_Config],
    presets: Mapping[str, Mapping[str, Any]],
    preset: str,
    overrides: Mapping[str, Any],
) -> _Config:
    """The settings of a named size, with some of them overridden.

    Raises:
        UserInputError: For an unknown preset or field, a missing field, or a value out of range.
    """
    if preset not in presets:
        raise UserInputError(f"unknown {family} preset {preset!r}: choose one of {', '.join(presets)}")
    values: dict[str, Any] = {**presets[preset], **overrides}
    fields = dataclasses.fields(config)  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - {field.name for field in fields}):
        known = ", ".join(field.name for field in fields)
        raise UserInputError(f"unknown {family} setting {', '.join(unknown)}: the settings are {known}")
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    if missing := sorted(required - values.keys()):
        raise UserInputError(f"{preset} needs a value for {', '.join(missing)}")
    return config(**values)
