"""One file per kind of operator: how the gradients of its parameters split by group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from lightning_modules.gradients.operators.convolution import convolution, transposed_convolution
from lightning_modules.gradients.operators.embedding import embedding
from lightning_modules.gradients.operators.linear import addmm, linear, matmul
from lightning_modules.gradients.operators.normalization import group_norm, instance_norm, layer_norm, rms_norm

HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    torch.matmul: matmul,
    torch.mm: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.mm: matmul,
    torch.Tensor.__matmul__: matmul,
    torch.addmm: addmm,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    torch.conv1d: convolution,
    torch.conv2d: convolution,
    torch.conv3d: convolution,
    F.conv_transpose1d: transposed_convolution,
    F.conv_transpose2d: transposed_convolution,
    F.conv_transpose3d: transposed_convolution,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.embedding: embedding,
}
"""Handlers by operator. A handler returns NotImplemented for a call that it does not know how to split."""

__all__ = ["HANDLERS"]
