"""EDM2's learned weighting of the loss over noise levels (Karras et al., 2024, arXiv 2312.02696, section 2.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_modules.seeding import seeded_generator

# Other than the streams of training: see `objective`.
_FEATURE_STREAM = 3


class LogSnrUncertainty(nn.Module):
    """Predicts u, the logarithm of the expected squared error, from the log-SNR.

    Training minimises ``error / exp(u) + u`` (EDM2, equations 14 and 21), whose minimum over u is the logarithm of the
    expected error at that log-SNR. The loss of every noise level is then about 1 before the term u, and its gradient
    is scaled alike, whatever the error's size. It is the weighting of tasks by homoscedastic uncertainty (Kendall et
    al., 2018, arXiv 1705.07115) with as many tasks as there are noise levels. A factor that depends on the log-SNR
    alone, as EDM2's lambda(sigma) or the choice of the target, shifts u and changes nothing else.

    As there, u is linear in magnitude-preserving Fourier features (equation 75) of ``c_noise = ln(sigma) / 4``; with
    sigma the ratio of noise to signal that is minus an eighth of the log-SNR. Other than there, the weight starts at
    zero, so that training starts with the plain loss, and is not normalised to a fixed length, which would bound u.

    Args:
        channels: Number of features.
        seed: Seed of the features' frequencies and phases.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int = 128, seed: int = 0) -> None:
        super().__init__()
        generator = seeded_generator(seed, _FEATURE_STREAM)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=generator))
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, log_snr: Tensor) -> Tensor:
        """Log-SNR (B,) -> u (B,), float32."""
        angles = (-log_snr.float() / 8)[:, None] * self.frequencies.float() + self.phases.float()
        features = math.sqrt(2) * torch.cos(angles)
        # A sum, not a matrix product: autocast would take that to half precision.
        return (features * self.weight.float()).sum(1) / math.sqrt(len(self.weight))

    def loss(self, error: Tensor, log_snr: Tensor) -> Tensor:
        """``error / exp(u) + u`` for errors (B,) at ``log_snr`` (B,); negative where the error is small."""
        u = self(log_snr)
        return error * torch.exp(-u) + u
