"""The optimizer of a denoiser, from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_modules.config import OptimizationConfig
from lightning_modules.gradients.gramian import trained_parameters


def build_optimizer(
    model: nn.Module, settings: OptimizationConfig, extra: Sequence[tuple[nn.Module, float]] = ()
) -> Any:
    """AdamW over the trainable parameters, with an optional linear warm-up, in the form Lightning asks for.

    Args:
        model: The backbone.
        settings: Its settings.
        extra: Further modules with trainable parameters, such as learned loss weights, and their learning rates, for
            training without weight decay and warm-up. Modules that have nothing to train are left out.
    """
    groups: list[dict[str, Any]] = [{"params": list(trained_parameters(model).values())}]
    for module, learning_rate in extra:
        if trained := list(trained_parameters(module).values()):
            groups.append({"params": trained, "lr": learning_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    if not settings.warmup_steps:
        return optimizer

    def rising(step: int) -> float:
        return min(1.0, (step + 1) / settings.warmup_steps)

    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, [rising, *[_constant] * (len(groups) - 1)])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


def _constant(step: int) -> float:  # noqa: ARG001
    return 1.0
