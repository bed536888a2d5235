"""What every sampler of training timesteps offers, and how one with a probability for each timestep draws."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from lightning_modules.timesteps import TimestepIntervals


class TimestepSampler(nn.Module, abc.ABC):
    """Draws training's timesteps.

    `sample` depends on the generator and the state alone and changes neither: a step's draw can be repeated until
    `observe_losses` or `observe_gradients` is called. State is in persistent buffers, for checkpoints.

    Attributes:
        is_weighted: Whether training multiplies each sample's loss by `importance`. True where the sampler is meant
            to change the variance of the gradient only, False where it is meant to change the objective.
        varies_within: Whether `importance` differs between timesteps of one interval.
        observes_losses: Whether `observe_losses` does anything.
        intervals: The tasks. A batch is ordered by task, except under ``uniform``; within a task the order is random.
    """

    is_weighted: bool
    varies_within = False
    observes_losses = False

    def __init__(self, intervals: TimestepIntervals) -> None:
        super().__init__()
        self.intervals = intervals

    @abc.abstractmethod
    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Timesteps (count,), int64, on the generator's device; the global generator and the CPU without one."""

    @abc.abstractmethod
    def importance(self, t: Tensor) -> Tensor:
        """Factors, float32 and of the shape of ``t``, for the mean over a batch to estimate the mean over uniform t.

        They are 1 / (T p_t), whether training applies them (`is_weighted`) or not.
        """

    @abc.abstractmethod
    def interval_importance(self) -> Tensor:
        """Factor by which `importance` multiplies an interval's mean, (K,), float64, on the CPU.

        The mean of ``importance(t) * loss`` over the samples that fell in interval k estimates this factor times the
        mean loss over uniform t of the interval. A probe of the weighted loss divides by it.
        """

    def relative_importance(self, t: Tensor) -> Tensor:
        """`importance` over that of the timestep's interval, shape of ``t``: of mean 1 within each interval."""
        return self.importance(t) / self.interval_importance().to(t.device)[self.intervals.task_of(t)].float()

    def observe_losses(self, t: Tensor, losses: Tensor) -> None:
        """Learns from a step's losses before `importance`, (B,), at ``t`` (B,), at most once per draw."""

    def observe_gradients(self, gramian: Tensor, counts: Tensor, halves: int) -> None:
        """Learns from a measurement of gradients.

        Args:
            gramian: Inner products (G, G), float64, of the groups' gradients, each that of the mean of its samples'
                losses before `importance`. Group ``task * halves + half``, G = K * halves.
            counts: Samples per group (G,).
            halves: Disjoint groups per task.
        """


class DistributionSampler(TimestepSampler):
    """A sampler defined by the probability of each timestep.

    A batch gives interval k its expected count of samples, rounded up or down at random (systematic sampling, one
    uniform offset for all intervals); which of the interval's timesteps they are is drawn independently. So each
    sample has the distribution asked for, the counts vary as little as they can, the batch is ordered by task, and
    the samples of a task are exchangeable, as the halves of the probe of gradient conflict need.
    """

    @abc.abstractmethod
    def probabilities(self) -> Tensor:
        """Probability of each timestep, (T,), float64, on the state's device; sums to 1."""

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """See `TimestepSampler`. The count of an interval is its expectation, rounded up or down without bias."""
        device = torch.device("cpu") if generator is None else generator.device
        cumulative = self.probabilities().to(device).cumsum(0)
        edges, low, high = self._edges(cumulative)
        mass = edges.diff()
        offset = torch.rand((), generator=generator, device=device, dtype=torch.float64)
        task = torch.repeat_interleave(systematic_counts(mass / mass.sum() * count, count, offset))
        within = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        t = torch.searchsorted(cumulative, edges[task] + within * mass[task], right=True)
        return t.clamp(low[task], high[task] - 1)  # rounding can put a draw on its interval's edge

    def importance(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`. 0 for a timestep so unlikely that its probability vanished: it is never drawn."""
        p = self.probabilities()
        factors = torch.where(p > 0, 1 / (len(p) * p), 0.0)
        return factors.float().to(t.device)[t]

    def interval_importance(self) -> Tensor:
        """See `TimestepSampler`: the interval's share of the timesteps over its probability; 0 if that is 0."""
        edges, low, high = self._edges(self.probabilities().cpu().cumsum(0))
        mass = edges.diff()
        return torch.where(mass > 0, (high - low) / (self.intervals.num_timesteps * mass), 0.0)

    def _edges(self, cumulative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From P(t' <= t) (T,): P(t' < bound) at the intervals' bounds (K + 1,); their lower and upper bounds (K,)."""
        bounds = torch.tensor(self.intervals.bounds, device=cumulative.device)
        return torch.cat([cumulative.new_zeros(1), cumulative])[bounds], bounds[:-1], bounds[1:]


def systematic_counts(expected: Tensor, count: int, offset: Tensor) -> Tensor:
    """Whole numbers (K,), int64, that sum to ``count`` and whose expectation over the offset is ``expected``.

    Systematic sampling (Madow, 1949): how many of the points ``offset, offset + 1, ...`` fall in each of the
    segments, of lengths ``expected``, that make up ``[0, count)``. Each is its expectation rounded up or down.

    Args:
        expected: Expected counts (K,), float64, at least 0, that sum to ``count`` up to rounding.
        count: What to sum to.
        offset: A scalar drawn uniformly from [0, 1).
    """
    ends = torch.ceil(expected.cumsum(0) - offset).long().clamp(0, count)
    ends[-1] = count
    return torch.diff(ends, prepend=ends.new_zeros(1))
