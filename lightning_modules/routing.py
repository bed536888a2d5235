"""Denoising Task Routing: every timestep uses its own subset of a residual block's channels.

Park et al., "Denoising Task Routing for Diffusion Models", ICLR 2024 (arXiv 2310.07138). Routing is an add-on:
`route` puts it on a backbone and `unroute` takes it off again; it adds no parameters and nothing to checkpoints,
because masks follow from `MaskConfig`, T and the number of channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lightning_modules.errors import UserInputError


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Which channels each timestep uses.

    Attributes:
        kind: ``"dtr"``, a window that slides over the channels as t grows, or ``"random"``, the paper's control
            R-TR: for each timestep a random subset of as many channels.
        alpha: Exponent of the window's shift (DTR only). 1: linear; above 1: slow at low t, fast at high t.
        beta: Share of the channels in use, in (0, 1]; 1 is the plain model.
        variant: ``"paper"`` (window edges at (t - 1)/T and t/T, each rounded) or ``"official"`` (fixed width,
            start at t/(T - 1), as in the released code). They differ in one channel of few rows at T = 1000, and
            visibly at small T.
        seed: Seed of the random masks.
        per_block: Random masks drawn anew for each block (as in the released code) instead of shared by all.
    """

    kind: Literal["dtr", "random"] = "dtr"
    alpha: float = 4.0
    beta: float = 0.8
    variant: Literal["paper", "official"] = "paper"
    seed: int = 0
    per_block: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("dtr", "random"):
            raise UserInputError(f"routing kind must be 'dtr' or 'random', got {self.kind!r}")
        if self.variant not in ("paper", "official"):
            raise UserInputError(f"routing variant must be 'paper' or 'official', got {self.variant!r}")
        if not 0 < self.beta <= 1:
            raise UserInputError(
                f"routing beta is the share of channels in use: it must lie in (0, 1], got {self.beta}"
            )
        if not self.alpha > 0:
            raise UserInputError(f"routing alpha must be positive, got {self.alpha}")
        if self.per_block and self.kind == "dtr":
            raise UserInputError("per_block is for random masks: DTR's window is the same in every block")


class Routable(Protocol):
    """What `route` needs of a backbone: it must consult ``routing`` in its forward pass."""

    routing: ChannelRouting | None

    @property
    def block_channels(self) -> dict[str, int]:
        """Name of each residual block -> channels that its branch reads, in network order."""


def active_channels(channels: int, beta: float) -> int:
    """C_b, the number of channels in a window: beta C, truncated as in the released code (the paper is silent)."""
    count = int(channels * beta)
    if count < 1:
        raise UserInputError(f"beta = {beta} leaves none of {channels} channels: raise beta or widen the model")
    return count


def dtr_windows(
    num_timesteps: int, channels: int, *, alpha: float, beta: float, variant: Literal["paper", "official"]
) -> np.ndarray:
    """The channel window of every timestep, shape (T, 2): first channel and width, int64.

    ``paper`` (section 4): channel c = 1..C is used at t = 1..T if
    round((C - C_b)((t - 1)/T)^alpha) < c <= round((C - C_b)(t/T)^alpha) + C_b.
    ``official``: fixed width C_b from round((C - C_b) (t0/(T - 1))^alpha), t0 = 0..T - 1.
    Rounding is to the nearest integer, halves to even.
    """
    width = active_channels(channels, beta)
    spare = channels - width
    if variant == "official":
        start = np.rint(np.linspace(0.0, 1.0, num_timesteps) ** alpha * spare)
        end = start + width
    else:
        edges = np.rint((np.arange(num_timesteps + 1) / num_timesteps) ** alpha * spare)
        start, end = edges[:-1], edges[1:] + width
    return np.stack([start, end - start], axis=1).astype(np.int64)


def channel_masks(config: MaskConfig, num_timesteps: int, channels: int, block: int = 0) -> np.ndarray:
    """The masks m of one block, shape (T, C), bool: row t tells which channels timestep t uses."""
    if config.kind == "dtr":
        windows = dtr_windows(num_timesteps, channels, alpha=config.alpha, beta=config.beta, variant=config.variant)
        start, width = windows[:, :1], windows[:, 1:]
        channel = np.arange(channels)
        return (channel >= start) & (channel < start + width)
    entropy = [config.seed, block] if config.per_block else [config.seed]
    order = np.random.default_rng(entropy).random((num_timesteps, channels)).argsort(axis=1)
    masks = np.zeros((num_timesteps, channels), dtype=bool)
    np.put_along_axis(masks, order[:, : active_channels(channels, config.beta)], True, axis=1)
    return masks


class ChannelRouting(nn.Module):
    """The masks of all residual blocks of a backbone, looked up by timestep.

    Masks are buffers that move with the model but stay out of its state dict.
    """

    def __init__(self, config: MaskConfig, num_timesteps: int, block_channels: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.num_timesteps = num_timesteps
        self._buffer_of_block: list[str] = []
        for block, channels in enumerate(block_channels):
            name = f"masks_{block}" if config.per_block else f"masks_c{channels}"
            if name not in self._buffers:
                masks = torch.from_numpy(channel_masks(config, num_timesteps, channels, block))
                self.register_buffer(name, masks, persistent=False)
            self._buffer_of_block.append(name)

    def forward(self, t: Tensor) -> list[Tensor]:
        """Masks for a batch: ``t`` (B,), integer or continuous in [0, T) -> per block (B, C), bool.

        Task t of the paper reaches from t up to t + 1, so continuous timesteps are rounded down.

        Raises:
            ValueError: If a timestep lies outside [0, T) (checked on CPU tensors only: elsewhere it would stall the
                device).
        """
        rows = t.floor().long() if t.is_floating_point() else t
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and rows.numel():
            low, high = rows.aminmax()
            if low < 0 or high >= self.num_timesteps:
                raise ValueError(f"timesteps must lie in [0, {self.num_timesteps}), got {low.item()}..{high.item()}")
        gathered = {name: getattr(self, name)[rows] for name in dict.fromkeys(self._buffer_of_block)}
        return [gathered[name] for name in self._buffer_of_block]

    def block_masks(self, block: int) -> np.ndarray:
        """The masks of one block, shape (T, C), bool."""
        return getattr(self, self._buffer_of_block[block]).cpu().numpy()


def masked_block(block: nn.Module, mask: Tensor, z: Tensor, *args: Tensor) -> Tensor:
    """Block(m * z) + (1 - m) * z for tokens ``z`` (B, N, C) and ``mask`` (B, C).

    For a residual block, Block(z) = z + F(z), this is the paper's z + F(m * z): the skip carries all channels.
    """
    m = mask.unsqueeze(1).to(z.dtype)
    return block(m * z, *args) + (1 - m) * z


def route(backbone: Routable, config: MaskConfig, num_timesteps: int = 1000) -> ChannelRouting:
    """Puts routing on a backbone's residual blocks, in place.

    Raises:
        ValueError: If the backbone is routed already.
        UserInputError: If beta leaves a block without channels.
    """
    if backbone.routing is not None:
        raise ValueError("this backbone is routed already: call unroute(backbone) first")
    backbone.routing = ChannelRouting(config, num_timesteps, list(backbone.block_channels.values()))
    return backbone.routing


def unroute(backbone: Routable) -> None:
    """Takes the routing off again; the backbone computes what it did before `route`."""
    backbone.routing = None
