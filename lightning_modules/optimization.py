"""The optimizer of a denoiser, from its settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_modules.config import OptimizationConfig


def build_optimizer(model: nn.Module, settings: OptimizationConfig) -> Any:
    """AdamW over the trainable parameters, with an optional linear warm-up, in the form Lightning asks for."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    if not settings.warmup_steps:
        return optimizer
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / settings.warmup_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}
