"""The parts of a DiT: embedders, transformer block and output layer.

Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023 (arXiv 2212.09748). Attribute names give the
state-dict keys of the published checkpoints. Shape letters: B samples, N tokens, C hidden channels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

FREQUENCIES = 256
"""Width of the sinusoidal timestep embedding."""
MAX_PERIOD = 10_000


def timestep_embedding(t: Tensor) -> Tensor:
    """Sinusoidal embedding of timesteps ``t`` (B,), integer or continuous: (B, 256), cosines first, in float32.

    Always computed in float32, as in the published code: lower precision cannot tell neighbouring timesteps apart.
    """
    half = FREQUENCIES // 2
    exponent = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    phase = t.float()[:, None] * exponent.exp()
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def position_embedding(channels: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding of a square grid of tokens.

    Args:
        channels: C, a multiple of 4. The first half encodes the column, the second the row; in each, sines first.
        side: Tokens per side.

    Returns:
        Embedding of shape ``(1, side * side, C)``, rows of the grid one after the other, float32.
    """
    quarter = channels // 4
    frequency = MAX_PERIOD ** -(np.arange(quarter) / quarter)
    row, column = np.divmod(np.arange(side * side), side)
    phases = [np.outer(axis, frequency) for axis in (column, row)]
    embedding = np.concatenate([wave(phase) for phase in phases for wave in (np.sin, np.cos)], axis=1)
    return torch.as_tensor(embedding, dtype=torch.float32)[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift`` for tokens ``x`` (B, N, C); shift and scale (B, C) are the same for all tokens."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """Cuts images (B, C_in, H, W) into patches and projects them: tokens (B, N, C)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C_in, H, W) -> tokens (B, N, C)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) -> conditioning vectors (B, C)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps (B,) -> (B, C), in the type of the weights."""
        return self.mlp(timestep_embedding(t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class labels (B,) -> conditioning vectors (B, C)."""

    def __init__(self, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Labels (B,) -> (B, C)."""
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, C)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C)."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C / heads)
        return self.proj(mixed.transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    """Two-layer perceptron with the tanh approximation of GELU, on tokens (B, N, C)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning: tokens (B, N, C) and conditioning (B, C) -> tokens (B, N, C)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, N, C) and conditioning (B, C) -> tokens (B, N, C)."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_attn[:, None] * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated projection of tokens (B, N, C) to patches (B, N, patch_size^2 * C_out)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, N, C) and conditioning (B, C) -> patches (B, N, patch_size^2 * C_out)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
