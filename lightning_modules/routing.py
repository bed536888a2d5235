"""Task routing: every timestep uses its own subset of a residual block's channels.

Park et al., "Denoising Task Routing for Diffusion Models", ICLR 2024 (arXiv 2310.07138). Routing is an add-on:
`route` puts it on a backbone and `unroute` takes it off again. Masks that follow from `MaskConfig`, T and the number of
channels add no parameters and nothing to checkpoints; learned masks add their logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_modules.learned_masks import LearnedMasks, learned_masks
from lightning_modules.masks import MaskConfig, active_channels, channel_masks, dtr_windows

__all__ = [
    "ChannelRouting",
    "MaskConfig",
    "Routable",
    "active_channels",
    "channel_masks",
    "dtr_windows",
    "masked_block",
    "route",
    "unroute",
]


class Routable(Protocol):
    """What `route` needs of a backbone: it must consult ``routing`` in its forward pass."""

    routing: ChannelRouting | None

    @property
    def block_channels(self) -> dict[str, int]:
        """Name of each residual block -> channels that its branch reads, in network order."""


class ChannelRouting(nn.Module):
    """The masks of all residual blocks of a backbone, looked up by timestep.

    Fixed masks are buffers that move with the model but stay out of its state dict. Learned masks are modules with a
    parameter each, in ``learned``: one for all blocks with as many channels, or one for each block with ``per_block``.

    Args:
        config: What kind of masks.
        num_timesteps: T.
        block_channels: Channels of each block, in network order.

    Raises:
        UserInputError: If the channels or timesteps are too few for the settings.
    """

    def __init__(self, config: MaskConfig, num_timesteps: int, block_channels: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.num_timesteps = num_timesteps
        self.learned = nn.ModuleDict()
        self._sources: list[tuple[str, int]] = []  # of each block: where its masks come from, and C_b
        for block, channels in enumerate(block_channels):
            count = active_channels(channels, config.block_beta(block, len(block_channels)))
            if config.kind == "learned":
                name = f"block{block}" if config.per_block else f"c{channels}"
                if name not in self.learned:
                    self.learned[name] = learned_masks(config, num_timesteps, channels, block)
            else:
                own = config.per_block or config.beta_last is not None
                name = f"masks_{block}" if own else f"masks_c{channels}"
                if name not in self._buffers:
                    masks = channel_masks(config, num_timesteps, channels, block, len(block_channels))
                    self.register_buffer(name, torch.from_numpy(masks), persistent=False)
            self._sources.append((name, count))

    def forward(self, t: Tensor) -> list[Tensor]:
        """Masks for a batch: ``t`` (B,), integer or continuous in [0, T) -> per block (B, C).

        Bool, or for learned masks 0 and 1 in the type of their logits, with a gradient. Task t of the paper reaches
        from t up to t + 1, so continuous timesteps are rounded down.

        Raises:
            ValueError: If a timestep lies outside [0, T) (checked on CPU tensors only: elsewhere it would stall the
                device).
        """
        rows = t.floor().long() if t.is_floating_point() else t
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and rows.numel():
            low, high = rows.aminmax()
            if low < 0 or high >= self.num_timesteps:
                raise ValueError(f"timesteps must lie in [0, {self.num_timesteps}), got {low.item()}..{high.item()}")
        gathered = {source: self._masks_at(*source, rows) for source in dict.fromkeys(self._sources)}
        return [gathered[source] for source in self._sources]

    def _masks_at(self, name: str, count: int, rows: Tensor) -> Tensor:
        return self.learned[name](rows, count) if name in self.learned else getattr(self, name)[rows]

    @property
    def is_learned(self) -> bool:
        """Whether the masks change in training."""
        return len(self.learned) > 0

    def block_masks(self, block: int) -> np.ndarray:
        """The masks of one block as they are now, shape (T, C), bool."""
        name, count = self._sources[block]
        if name in self.learned:
            return cast(LearnedMasks, self.learned[name]).masks(count)
        return getattr(self, name).cpu().numpy()


def masked_block(block: nn.Module, mask: Tensor, z: Tensor, *args: Tensor) -> Tensor:
    """Block(m * z) + (1 - m) * z for tokens ``z`` (B, N, C) and ``mask`` (B, C), bool or floating-point.

    For a residual block, Block(z) = z + F(z), this is the paper's z + F(m * z): the skip carries all channels.
    """
    m = mask.unsqueeze(1).to(z.dtype)
    return block(m * z, *args) + (1 - m) * z


def route(backbone: Routable, config: MaskConfig, num_timesteps: int = 1000) -> ChannelRouting:
    """Puts routing on a backbone's residual blocks, in place.

    Raises:
        ValueError: If the backbone is routed already.
        UserInputError: If the channels or timesteps are too few for the settings.
    """
    if backbone.routing is not None:
        raise ValueError("this backbone is routed already: call unroute(backbone) first")
    backbone.routing = ChannelRouting(config, num_timesteps, list(backbone.block_channels.values()))
    return backbone.routing


def unroute(backbone: Routable) -> None:
    """Takes the routing off again, learned masks included; the backbone computes what it did before `route`."""
    backbone.routing = None
