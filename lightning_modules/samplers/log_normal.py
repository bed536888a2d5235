"""EDM's log-normal distribution of noise levels, on discrete timesteps (Karras et al., 2022, arXiv 2206.00364)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.samplers.base import DistributionSampler
from lightning_modules.timesteps import TimestepIntervals


class LogNormalSampler(DistributionSampler):
    """Timesteps whose ln sigma is normal (EDM, table 1: P_mean -1.2, P_std 1.2); changes the objective.

    sigma is the ratio of noise to signal, EDM's noise level for data that are not scaled. A normal draw of ln sigma
    goes to the timestep that is nearest to it: p_t is the normal mass of a cell that ends half-way to the neighbours,
    and the outermost cells reach to infinity.

    Args:
        intervals: The tasks.
        log_snr: Log-SNR of each timestep, strictly decreasing, (T,); ln sigma is minus its half.
        mean: Mean of ln sigma.
        std: Its standard deviation.
    """

    is_weighted = False
    _probabilities: Tensor

    def __init__(self, intervals: TimestepIntervals, log_snr: Tensor, mean: float, std: float) -> None:
        super().__init__(intervals)
        log_sigma = -log_snr.detach().cpu().double() / 2
        midpoints = (log_sigma[1:] + log_sigma[:-1]) / 2
        self.register_buffer("_probabilities", normal_cells((midpoints - mean) / std), persistent=False)

    def probabilities(self) -> Tensor:
        """See `DistributionSampler`."""
        return self._probabilities.double()


def normal_cells(edges: Tensor) -> Tensor:
    """Standard normal mass between neighbouring edges, and beyond the outer ones: (N,) increasing -> (N + 1,)."""
    infinity = edges.new_full((1,), torch.inf)
    low, high = torch.cat([-infinity, edges]), torch.cat([edges, infinity])
    # In the upper tail the distribution function is 1 up to rounding; its mirror image is exact there.
    mirrored = low > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    return torch.special.ndtr(high) - torch.special.ndtr(low)
