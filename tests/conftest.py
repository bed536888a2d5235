"""Small denoisers that the tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lightning_modules.backbones.dit import DiTConfig
from lightning_modules.backbones.unet_config import UNetConfig
from lightning_modules.config import IntervalConfig
from lightning_modules.denoiser import BaselineModule, DenoiserModule, DTRModule
from lightning_modules.diffusion import DiffusionConfig
from lightning_modules.routing import MaskConfig

BACKBONE = DiTConfig(
    input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=10, learn_sigma=False
)
UNET = UNetConfig(
    input_size=8,
    in_channels=1,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    head_channels=8,
    norm_groups=4,
    num_classes=10,
    learn_sigma=False,
)
DIFFUSION = DiffusionConfig(schedule="cosine", variance="fixed_small")


@pytest.fixture
def make_denoiser() -> Callable[..., DenoiserModule]:
    """Builds a plain or routed denoiser with open gates, in float64 on request."""

    def make(method: str = "baseline", *, awake: bool = True, **settings) -> DenoiserModule:
        arguments = {
            "backbone": BACKBONE,
            "diffusion": DIFFUSION,
            "intervals": IntervalConfig(num_intervals=4),
            **settings,
        }
        module: DenoiserModule
        if method == "baseline":
            module = BaselineModule(**arguments)
        else:
            module = DTRModule(routing=MaskConfig(kind=method, beta=0.5), **arguments)
        if awake:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in module.backbone.parameters():
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        return module

    return make


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Sixteen images and labels."""
    generator = torch.Generator().manual_seed(2)
    return torch.rand(16, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(16) % 10
