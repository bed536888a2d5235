"""What training on one task does to the losses of all, measured by doing it: look-ahead and fine-tuning.

Look-ahead is task affinity grouping's (Fifty et al., arXiv 2109.04617, equation 1): take one real gradient step on
task i from the weights at hand, see how the loss of every task j changes, take the step back. Fine-tuning goes on for
many steps (Min-SNR, arXiv 2303.09556, figure 2, fine-tunes on a range of timesteps and looks at all others).

Losses before and after are of the same images, noise and timesteps, so their difference has little of the noise that
each of them has; what is kept are sums over samples of the loss before and of the paired difference, from which
`analysis.transfer` makes affinities with their errors. The first-order prediction of a look-ahead comes from the
Gramian between the samples stepped on and the samples evaluated, by one recorded backward pass for all pairs.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.backbones.backbone import Backbone
from lightning_modules.denoiser import DenoiserModule, NoisedBatch
from lightning_modules.gradients import GramianRecorder
from lightning_modules.timesteps import TimestepIntervals

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What updates on one task did to the losses of all K.

    Attributes:
        source: The task trained on.
        updates: Updates made.
        count: Samples of each task (K,).
        before: Sum of their losses before the updates (K,).
        change: Sum over the same samples of the loss after minus the loss before (K,).
        change_sq: Sum of the squares of these differences (K,).
        predicted: First-order prediction of the mean change (K,); NaN where there is none.
    """

    source: int
    updates: int
    count: Tensor
    before: Tensor
    change: Tensor
    change_sq: Tensor
    predicted: Tensor


class TransferMeter:
    """Trains a network on single tasks and puts it back as it was.

    Args:
        module: The losses; its intervals are the tasks unless others are given.
        backbone: The network, in evaluation mode; left as it was found.
        make_optimizer: Makes the optimizer of the updates for the network's trainable parameters; its state is set
            back before each source, so that every task starts from the same one.
        intervals: The tasks.
    """

    def __init__(
        self,
        module: DenoiserModule,
        backbone: Backbone,
        make_optimizer: MakeOptimizer,
        intervals: TimestepIntervals | None = None,
    ) -> None:
        self.module = module
        self.backbone = backbone
        self.intervals = module.intervals if intervals is None else intervals
        self._optimizer = make_optimizer(backbone)
        self._optimizer_state = copy.deepcopy(self._optimizer.state_dict())
        self._weights = [parameter.detach().clone() for parameter in self._trained]

    def look_ahead(self, update: NoisedBatch, evaluation: NoisedBatch) -> list[Transfer]:
        """One update on each task's samples in ``update``, from the same weights each time.

        Args:
            update: Samples to step on; every task needs some. The step is taken on the mean loss of the task's.
            evaluation: Other samples, whose losses are looked at.

        Returns:
            One entry for each source, with the first-order prediction -η <g_i, g_j> if the optimizer is plain SGD.
        """
        predicted = self._predicted_changes(update, evaluation)
        before = self._losses([evaluation])
        task = self._tasks([evaluation])
        found = []
        for source in range(self.intervals.num_intervals):
            mine = self.intervals.task_of(update.t) == source
            with self._restored():
                self._update(_chosen(update, mine))
                after = self._losses([evaluation])
            found.append(self._transfer(source, 1, task, before, after, predicted[source]))
        return found

    def fine_tune(
        self,
        source: int,
        draw: Callable[[int], NoisedBatch],
        evaluation: Sequence[NoisedBatch],
        updates: Sequence[int],
    ) -> Iterator[Transfer]:
        """Trains on one task, and evaluates after each of the given numbers of updates.

        Args:
            source: The task.
            draw: Update number (from 1) -> its batch, all of it from the task's interval.
            evaluation: Batches whose losses are looked at, the same before and after.
            updates: Increasing numbers of updates.

        Yields:
            One entry for each number of updates.
        """
        before, task = self._losses(evaluation), self._tasks(evaluation)
        unknown = torch.full((self.intervals.num_intervals,), math.nan, dtype=torch.float64)
        with self._restored():
            for number in range(1, max(updates) + 1):
                self._update(draw(number))
                if number in updates:
                    yield self._transfer(source, number, task, before, self._losses(evaluation), unknown)

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]

    def _restored(self) -> _Restored:
        return _Restored(self._restore)

    def _restore(self) -> None:
        with torch.no_grad():
            for parameter, kept in zip(self._trained, self._weights, strict=True):
                parameter.copy_(kept)
        self.backbone.zero_grad(set_to_none=True)
        self._optimizer.load_state_dict(copy.deepcopy(self._optimizer_state))

    def _update(self, batch: NoisedBatch) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self.module.sample_losses(batch, self.backbone).loss.mean().backward()
        self._optimizer.step()

    @torch.no_grad()
    def _losses(self, batches: Sequence[NoisedBatch]) -> Tensor:
        """Training losses per sample (N,), float64, on the CPU."""
        return torch.cat([self.module.sample_losses(batch, self.backbone).loss.double().cpu() for batch in batches])

    def _tasks(self, batches: Sequence[NoisedBatch]) -> Tensor:
        return torch.cat([self.intervals.task_of(batch.t).cpu() for batch in batches])

    def _transfer(
        self, source: int, updates: int, task: Tensor, before: Tensor, after: Tensor, predicted: Tensor
    ) -> Transfer:
        count = self.intervals.num_intervals
        change = after - before

        def by_task(values: Tensor) -> Tensor:
            return torch.zeros(count, dtype=torch.float64).index_add_(0, task, values)

        return Transfer(
            source=source,
            updates=updates,
            count=torch.bincount(task, minlength=count),
            before=by_task(before),
            change=by_task(change),
            change_sq=by_task(change.square()),
            predicted=predicted,
        )

    def _predicted_changes(self, update: NoisedBatch, evaluation: NoisedBatch) -> Tensor:
        """-η <g_i, g_j> (K, K) of the samples stepped on and the samples evaluated; NaN unless a step is -η g_i."""
        count = self.intervals.num_intervals
        rate = _plain_rate(self._optimizer)
        if rate is None:
            return torch.full((count, count), math.nan, dtype=torch.float64)
        both = _joined(update, evaluation)
        group = torch.cat([self.intervals.task_of(update.t), count + self.intervals.task_of(evaluation.t)])
        recorder = GramianRecorder(self.backbone, group, 2 * count)
        with recorder:
            self.module.sample_losses(both, self.backbone).loss.mean().backward()
        gramian = recorder.result()  # before its gradients go: it looks whether they are what it saw
        self.backbone.zero_grad(set_to_none=True)
        products = gramian.total()[:count, count:].cpu()
        return -rate * products if gramian.coverage == 1 else torch.full_like(products, math.nan)


class _Restored:
    """Calls a function at the end of a block, however it ends."""

    def __init__(self, restore: Callable[[], None]) -> None:
        self.restore = restore

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: Any) -> None:
        self.restore()


def _chosen(batch: NoisedBatch, which: Tensor) -> NoisedBatch:
    y = None if batch.y is None else batch.y[which]
    return NoisedBatch(batch.x0[which], y, batch.t[which], batch.noise[which])


def _joined(first: NoisedBatch, second: NoisedBatch) -> NoisedBatch:
    y = None if first.y is None or second.y is None else torch.cat([first.y, second.y])
    x0, t, noise = (torch.cat([getattr(first, part), getattr(second, part)]) for part in ("x0", "t", "noise"))
    return NoisedBatch(x0, y, t, noise)


def _plain_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate of plain gradient descent; None for anything else."""
    (group,) = optimizer.param_groups
    plain = isinstance(optimizer, torch.optim.SGD) and not (group["momentum"] or group["weight_decay"])
    return float(group["lr"]) if plain else None
