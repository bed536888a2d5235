"""Importance sampling of tasks by the size of a sample's gradient, as the probe of gradient conflict measures it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.errors import UserInputError
from lightning_modules.samplers.base import DistributionSampler
from lightning_modules.samplers.config import GradientMoment
from lightning_modules.timesteps import TimestepIntervals


class GradientMoments(NamedTuple):
    """Unbiased estimates of the moments of a sample's gradient, per task, each (K,), float64.

    Attributes:
        mean: Squared norm |g_k|^2 of the expected gradient; the estimate may be negative.
        variance: Trace of the covariance, tr Sigma_k.
        measured: Whether the task had two groups with samples, and finite products, bool.
    """

    mean: Tensor
    variance: Tensor
    measured: Tensor


def gradient_moments(gramian: Tensor, counts: Tensor, halves: int) -> GradientMoments:
    """The moments of a sample's gradient from the Gramian of the groups' mean gradients.

    With n_i samples in group i of a task, N in all, m_i the groups' gradients and m their mean over the N samples:
    ``sum_i n_i |m_i - m|^2 / (groups - 1)`` has the expectation tr Sigma (one-way analysis of variance), and
    ``|m|^2 - tr Sigma / N`` that of |g|^2 (as McCandlish et al., 2018, arXiv 1812.06162, appendix A.1, for the
    batches of two sizes that m_i and m are). Groups without samples do not count.

    Args:
        gramian: Inner products (G, G), float64, G = K * halves.
        counts: Samples per group (G,).
        halves: Groups per task.
    """
    samples = counts.double().reshape(-1, halves)
    tasks = torch.arange(len(samples), device=gramian.device)
    within = gramian.double().reshape(len(samples), halves, len(samples), halves)[tasks, :, tasks, :]
    total = samples.sum(1)
    weighted = torch.einsum("ki,kij,kj->k", samples, within, samples) / total.square().clamp(min=1)
    scatter = (samples * within.diagonal(dim1=1, dim2=2)).sum(1) - total * weighted
    groups = (samples > 0).sum(1)
    variance = (scatter / (groups - 1).clamp(min=1)).clamp(min=0)  # below 0 by rounding alone
    mean = weighted - variance / total.clamp(min=1)
    return GradientMoments(mean, variance, (groups >= 2) & mean.isfinite() & variance.isfinite())


class GradientNoiseSampler(DistributionSampler):
    """Tasks in proportion to their share of the timesteps times the size of a sample's gradient, t uniform in a task.

    With w_k an interval's share of the timesteps, ``P_k ~ w_k sqrt(E|g|^2)``, ``E|g|^2 = |g_k|^2 + tr Sigma_k``, gives
    the weighted gradient of independent samples the least variance (importance sampling; Zhao & Zhang, 2015,
    arXiv 1401.2753). Here a task's count is all but fixed, so that differences between the tasks' g_k add hardly any
    variance, and ``P_k ~ w_k sqrt(tr Sigma_k)`` is the best (Neyman, 1934); that is ``moment="variance"``. The two
    agree where noise dominates a single sample's gradient, as it does in all but the first steps.

    Both moments are averaged over measurements, with weights that decay, before the root is taken. A share of the
    uniform distribution is mixed in. Until every task has been measured, it does what `StratifiedSampler` does.

    Args:
        intervals: The tasks.
        decay: Decay of the averages.
        floor: Share of the uniform distribution.
        moment: Which size of a gradient counts.
    """

    is_weighted = True
    moments: Tensor  # (3, K), float64: sums over measurements of the weights, and of |g|^2 and tr Sigma times them

    def __init__(self, intervals: TimestepIntervals, decay: float, floor: float, moment: GradientMoment) -> None:
        super().__init__(intervals)
        self.decay = decay
        self.floor = floor
        self.moment = moment
        self.register_buffer("moments", torch.zeros(3, intervals.num_intervals, dtype=torch.float64))

    @property
    def is_informed(self) -> bool:
        """Whether every task has been measured with something to tell: the distribution is the measured one."""
        return bool((self.moments[0] > 0).all() & (self._shares().sum() > 0))

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """See `DistributionSampler`; until informed `TimestepIntervals.sample_stratified`."""
        if not self.is_informed:
            return self.intervals.sample_stratified(count, generator)
        return super().sample(count, generator)

    def importance(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`; until informed `TimestepIntervals.importance`."""
        return super().importance(t) if self.is_informed else self.intervals.importance(t)

    def probabilities(self) -> Tensor:
        """See `DistributionSampler`."""
        widths = self._widths()
        if self.is_informed:
            shares = self._shares()
            mass = (1 - self.floor) * shares / shares.sum() + self.floor * widths / widths.sum()
        else:
            mass = torch.full_like(widths, 1 / len(widths))
        return torch.repeat_interleave(mass / widths, widths.long())

    @torch.no_grad()
    def observe_gradients(self, gramian: Tensor, counts: Tensor, halves: int) -> None:
        """See `TimestepSampler`. Tasks without two groups with samples keep their averages.

        Raises:
            UserInputError: If ``halves`` is 1: without two groups per task noise cannot be told from the mean.
            ValueError: If the Gramian is not that of the tasks' groups.
        """
        if halves < 2:
            raise UserInputError(
                f"sampler.name is 'gradient_noise' and gradient_conflict halves is {halves}: it must be at least 2"
            )
        groups = self.intervals.num_intervals * halves
        if gramian.shape != (groups, groups) or counts.shape != (groups,):
            raise ValueError(
                f"{self.intervals.num_intervals} tasks of {halves} halves need a Gramian ({groups}, {groups}) and "
                f"counts ({groups},), got {tuple(gramian.shape)} and {tuple(counts.shape)}"
            )
        new = gradient_moments(gramian.detach().to(self.moments.device), counts.to(self.moments.device), halves)
        terms = torch.stack([torch.ones_like(new.mean), new.mean, new.variance])
        updated = self.decay * self.moments + (1 - self.decay) * terms
        self.moments.copy_(torch.where(new.measured, updated, self.moments))

    def _widths(self) -> Tensor:
        return torch.tensor(self.intervals.widths, dtype=torch.float64, device=self.moments.device)

    def _shares(self) -> Tensor:
        """What the probabilities of the tasks are proportional to, (K,), float64."""
        weight, mean, variance = self.moments.double()
        size = variance if self.moment == "variance" else mean + variance
        return self._widths() * (size / weight.clamp(min=1e-300)).clamp(min=0).sqrt()
