"""How much arithmetic a backbone takes."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.backbones.build import build_backbone
from lightning_modules.backbones.dit import DiTConfig
from lightning_modules.backbones.unet_config import UNetConfig


def flops_per_sample(config: DiTConfig | UNetConfig, *, backward: bool = True) -> float:
    """Floating-point operations of one sample's forward pass, and backward pass on request.

    Two for each multiply-add of matrix products, convolutions and attention, as torch's own counter has it; what is
    linear in the activations (norms, gates, the channel masks of routing) is left out, as in the literature, where
    DiT-S/2 takes 6.06 G multiply-adds forward at 256 x 256 (DiT, table 4). Computed on torch's meta device: it takes
    neither memory nor arithmetic.
    """
    with torch.device("meta"):
        backbone = build_backbone(config)
        x = torch.zeros(1, config.in_channels, config.input_size, config.input_size)
        t = torch.zeros(1, dtype=torch.long)
        y = torch.zeros(1, dtype=torch.long) if config.num_classes else None
        with FlopCounterMode(display=False) as counter:
            output = backbone(x, t, y)
            if backward:
                output.sum().backward()
    return float(counter.get_total_flops())
