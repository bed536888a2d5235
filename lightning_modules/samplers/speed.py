"""SpeeD's asymmetric sampling (Wang et al., CVPR 2025, arXiv 2405.17403)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.errors import UserInputError
from lightning_modules.samplers.base import DistributionSampler
from lightning_modules.timesteps import TimestepIntervals


class SpeedSampler(DistributionSampler):
    """Fewer timesteps of the convergence area, where x_t hardly changes with t; changes the objective.

    ``P(t) = k / (T + tau (k - 1))`` for the first tau timesteps, the acceleration and deceleration areas, and
    ``1 / (T + tau (k - 1))`` for the others. From a magnitude r the paper takes, for linear betas,
    ``tau = sqrt(2 T ln r / D + T^2 beta_0^2 / D^2) - T beta_0 / D`` with ``D = beta_T - beta_0``: the solution of
    ``exp(beta_0 tau + D tau^2 / 2T) = r``, whose left side approximates 1 / abar. Solved for abar itself it holds for
    every schedule: tau counts the timesteps with ``abar_t > 1 / r``.

    The closed form is quoted from memory (the paper could not be opened where this was written), and 144 for r is
    ours: it gives the 700 of 1000 that the authors' code takes as given for tau. Their code also fills half of the
    batch with mirror images ``|m - t|`` of the other half, m about 640, which halves the probability of all timesteps
    above m; that is not done here.

    Args:
        intervals: The tasks.
        log_snr: Log-SNR of each timestep (T,), decreasing.
        k: Suppression intensity.
        tau: tau, or None to find it by ``magnitude``.
        magnitude: r.

    Raises:
        UserInputError: If tau exceeds T, or the schedule has no convergence area of that magnitude.
    """

    is_weighted = False
    _probabilities: Tensor

    def __init__(
        self, intervals: TimestepIntervals, log_snr: Tensor, k: float, tau: int | None, magnitude: float
    ) -> None:
        super().__init__(intervals)
        self.tau = convergence_start(log_snr, magnitude) if tau is None else tau
        if self.tau > intervals.num_timesteps:
            raise UserInputError(f"sampler.speed_tau is {tau}: it must be at most T = {intervals.num_timesteps}")
        relative = torch.ones(intervals.num_timesteps, dtype=torch.float64)
        relative[: self.tau] = k
        self.register_buffer("_probabilities", relative / relative.sum(), persistent=False)

    def probabilities(self) -> Tensor:
        """See `DistributionSampler`."""
        return self._probabilities.double()


def convergence_start(log_snr: Tensor, magnitude: float) -> int:
    """The first timestep whose signal has at most 1 / r of the variance; see `SpeedSampler` for errors."""
    signal = torch.sigmoid(log_snr.detach().double())
    tau = int((signal > 1 / magnitude).sum())
    if not 0 < tau < len(signal):
        raise UserInputError(
            f"sampler.speed_magnitude is {magnitude:g}: the signal's share of the variance, "
            f"{float(signal[0]):.3g} to {float(signal[-1]):.3g}, must pass 1 / {magnitude:g}; or set sampler.speed_tau"
        )
    return tau
