"""From the losses of a batch's samples to the loss that is back-propagated: multi-task optimisation of the tasks.

All methods end in weights w_k of the tasks' losses L_k, so that the step's gradient is that of sum_k w_k L_k; L_k is K
times the task's part of the training loss, and w_k = 1 / K is plain training.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_modules.gradients.gramian import Gramian
from lightning_modules.gradients.groups import split_tasks
from lightning_modules.gradients.separate import RowCollector, SeparateRecorder

ToLoss = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Request:
    """A probe's wish for the Gramian of a step.

    Attributes:
        halves: Into how many groups to split each task.
        processes: Whose gradients, see `GramianRecorder`.
    """

    halves: int
    processes: Literal["global", "local"] = "global"


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a balancer must know of a training step.

    Attributes:
        task: Task of each sample (B,).
        step: Optimizer steps completed before this one.
        first_batch: Whether this is the first batch of the step, under gradient accumulation.
        entropy: Integers that all randomness of the step follows from, the same in all processes.
        loss_scale: Factor that a gradient scaler puts on the loss.
        request: What a probe wants to know of this batch.
    """

    task: Tensor
    step: int
    first_batch: bool = True
    entropy: tuple[int, ...] = ()
    loss_scale: float = 1.0
    request: Request | None = None


class Balancer(nn.Module, abc.ABC):
    """Decides what is back-propagated.

    Attributes:
        weights: K w_k of the last batch (K,), 1 for plain training; a buffer outside of the state dict.
        gramian: The Gramian that the last batch's `Request` asked for, or that was needed; None if neither.
    """

    weights: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.register_buffer("weights", torch.ones(num_tasks), persistent=False)
        self.gramian: Gramian | None = None

    @contextlib.contextmanager
    def watch(self, model: nn.Module, situation: Situation) -> Iterator[ToLoss]:
        """Surrounds a forward pass of ``model``.

        The context gives a function, to be called inside of it, from the samples' losses (B,), whose mean is the
        training loss, to the loss to back-propagate afterwards. A request costs a backward pass of its own, of the
        plain loss, where no Gramian is needed anyway.
        """
        self.gramian = None
        if situation.request is None:
            yield lambda losses: self.loss(losses, situation)
            return
        request = situation.request
        recorder = self._recorder(model, situation, request.halves, request.processes)

        def to_loss(losses: Tensor) -> Tensor:
            self.gramian = recorder.measure(losses.mean() * situation.loss_scale, keep_graph=True)
            return self.loss(losses, situation)

        with recorder:
            yield to_loss

    @abc.abstractmethod
    def loss(self, losses: Tensor, situation: Situation) -> Tensor:
        """The loss to back-propagate, from the samples' (B,), without a Gramian."""

    def after_step(self, step: int, losses: Callable[[], Tensor]) -> None:
        """Called when ``step`` optimizer steps are completed; ``losses`` gives those of the batch's samples anew."""

    def state(self) -> dict[str, Any]:
        """What must be remembered besides the state dict."""
        return {"weights": self.weights.clone()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.weights = state["weights"].to(self.weights.device)

    def task_losses(self, losses: Tensor, task: Tensor) -> Tensor:
        """The tasks' losses (K,) from the samples' (B,)."""
        return losses.new_zeros(self.num_tasks).index_add(0, task, losses) * (self.num_tasks / len(losses))

    def _recorder(
        self,
        model: nn.Module,
        situation: Situation,
        halves: int,
        processes: Literal["global", "local"],
        rows: RowCollector | None = None,
    ) -> SeparateRecorder:
        num_groups = self.num_tasks * halves
        group = split_tasks(situation.task, self.num_tasks, halves)
        unscale = torch.full((num_groups,), 1 / situation.loss_scale, dtype=torch.float64, device=group.device)
        return SeparateRecorder(model, group, num_groups, scale=unscale, processes=processes, collector=rows)


class PlainTraining(Balancer):
    """The mean over the batch."""

    def loss(self, losses: Tensor, situation: Situation) -> Tensor:
        """See `Balancer.loss`."""
        return losses.mean()


def average_over_processes(values: Tensor) -> Tensor:
    """The average over the processes of a distributed training; ``values`` themselves in any other."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
