"""Masks that training finds: a subset of the channels for each cluster of timesteps, by a straight-through estimator.

Every channel has a logit; the mask is hard, the channels of largest logit, as many as beta says. It has no useful
derivative, so the backward pass takes that of sigmoid(logit / temperature) instead: the straight-through estimator of
Bengio, Léonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons" (2013, arXiv 1308.3432).
Keeping the highest scores and training them so is the edge-popup algorithm of Ramanujan et al., "What's Hidden in a
Randomly Weighted Neural Network?" (CVPR 2020, arXiv 1911.13299), there with the identity for a derivative.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from lightning_modules.masks import MaskConfig
from lightning_modules.timesteps import TimestepIntervals

_NOISE = 0.01
"""Standard deviation of the first logits: enough to decide the first masks, little beside what training adds."""


class LearnedMasks(nn.Module):
    """The masks of one block, or of all blocks with as many channels.

    Attributes:
        logits: (K, C), a row for each cluster of timesteps. The only parameter.

    Args:
        intervals: The clusters.
        channels: C.
        seed: Seed of the first logits.
        temperature: See `straight_through`.
    """

    cluster_of: Tensor

    def __init__(self, intervals: TimestepIntervals, channels: int, *, seed: Sequence[int], temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        # NumPy's generator: torch's own would shift the random numbers that other weights are drawn from.
        first = _NOISE * np.random.default_rng(seed).standard_normal((intervals.num_intervals, channels))
        self.logits = nn.Parameter(torch.from_numpy(first).float())
        cluster = torch.arange(intervals.num_intervals).repeat_interleave(torch.tensor(intervals.widths))
        self.register_buffer("cluster_of", cluster, persistent=False)

    def forward(self, rows: Tensor, count: int) -> Tensor:
        """Masks of ``count`` channels at whole timesteps ``rows`` (B,): (B, C) of zeros and ones, with a gradient."""
        # Looked up before anything is computed: gradients of single samples can be told apart at an embedding.
        return straight_through(F.embedding(self.cluster_of[rows], self.logits), count, self.temperature)

    @torch.no_grad()
    def masks(self, count: int) -> np.ndarray:
        """The masks of ``count`` channels that the logits give now, (T, C), bool."""
        return largest(self.logits, count).bool()[self.cluster_of].cpu().numpy()


def largest(logits: Tensor, count: int) -> Tensor:
    """1 for the ``count`` largest numbers of each row, 0 for the others: (..., C), in the type of ``logits``.

    Of equal ones the first count, so that a row gives the same mask wherever it stands in a batch.
    """
    order = logits.detach().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(logits).scatter(-1, order[..., :count], 1.0)


def straight_through(logits: Tensor, count: int, temperature: float) -> Tensor:
    """`largest` in the forward pass, with the gradient of sigmoid(logits / temperature): (..., C).

    m = hard + (s - s'), s' being s without a gradient; the parentheses keep m at exactly 0 and 1.
    """
    soft = torch.sigmoid(logits / temperature)
    return largest(logits, count) + (soft - soft.detach())


def learned_masks(config: MaskConfig, num_timesteps: int, channels: int, block: int) -> LearnedMasks:
    """The untrained masks of a block, or of all blocks with as many channels of which this is the first.

    Raises:
        UserInputError: If the clusters do not fit the T timesteps.
    """
    intervals = config.cluster_intervals(num_timesteps)
    return LearnedMasks(intervals, channels, seed=[config.seed, block], temperature=config.temperature)
