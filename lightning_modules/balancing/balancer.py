"""From the losses of a batch's samples to the loss that is back-propagated: multi-task optimisation of the tasks.

All methods end in weights w_k of the tasks' losses L_k, so that the step's gradient is that of sum_k w_k L_k; L_k is K
times the task's part of the training loss, and w_k = 1 / K is plain training.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.balancing.gramian_weights import GramianWeights
from lightning_modules.balancing.scalarizers import LossScalarizer
from lightning_modules.gradients.gramian import Gramian
from lightning_modules.gradients.groups import split_tasks
from lightning_modules.gradients.separate import GivenGradient, RowCollector, SeparateRecorder

ToLoss = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a balancer must know of a training step.

    Attributes:
        task: Task of each sample (B,).
        step: Optimizer steps completed before this one.
        first_batch: Whether this is the first batch of the step, under gradient accumulation.
        entropy: Integers that all randomness of the step follows from, the same in all processes.
        loss_scale: Factor that a gradient scaler puts on the loss.
        halves: Into how many groups to split each task, for a probe that wants the Gramian.
    """

    task: Tensor
    step: int
    first_batch: bool = True
    entropy: tuple[int, ...] = ()
    loss_scale: float = 1.0
    halves: int = 1


class Balancer(nn.Module, abc.ABC):
    """Decides what is back-propagated.

    Attributes:
        weights: K w_k of the last batch (K,), 1 for plain training; a buffer outside of the state dict.
        gramian: What the last batch's Gramian was, over ``tasks * halves`` groups; None if it was not measured.
    """

    weights: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.register_buffer("weights", torch.ones(num_tasks), persistent=False)
        self.gramian: Gramian | None = None

    def measures(self, step: int, first_batch: bool) -> bool:
        """Whether the Gramian will be measured in a step; see `Situation`."""
        return False

    @abc.abstractmethod
    def watch(self, model: nn.Module, situation: Situation) -> contextlib.AbstractContextManager[ToLoss]:
        """Surrounds a forward pass of ``model``.

        The context gives a function, to be called inside of it, from the samples' losses (B,), whose mean is the
        training loss, to the loss to back-propagate afterwards.
        """

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


class PlainTraining(Balancer):
    """The mean over the batch."""

    @contextlib.contextmanager
    def watch(self, model: nn.Module, situation: Situation) -> Iterator[ToLoss]:
        """See `Balancer.watch`."""
        yield torch.mean


class LossBalancer(Balancer):
    """Weights from the tasks' losses.

    Args:
        config: The method.
        num_tasks: K.
    """

    def __init__(self, config: BalancingConfig, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.scalarizer = LossScalarizer(config, num_tasks)
        self._task = torch.zeros(0)

    @contextlib.contextmanager
    def watch(self, model: nn.Module, situation: Situation) -> Iterator[ToLoss]:
        """See `Balancer.watch`."""
        self._task = situation.task

        def to_loss(losses: Tensor) -> Tensor:
            own = self.task_losses(losses, situation.task)
            everywhere = _averaged(own.detach())
            if not bool(everywhere.isfinite().all()):  # overflow under fp16, which the scaler deals with
                return losses.mean() + 0 * sum(parameter.sum() for parameter in self.parameters())
            value, weights = self.scalarizer(everywhere, *situation.entropy)
            self.weights = weights * self.num_tasks
            # The value of the first term is left out: it is in the second, which carries learned weights' gradients.
            model_part = (weights.to(own) * own).sum()
            return model_part - model_part.detach() + value

        yield to_loss

    def after_step(self, step: int, losses: Callable[[], Tensor]) -> None:
        """See `Balancer.after_step`."""

        def now() -> Tensor:
            return _averaged(self.task_losses(losses(), self._task))

        self.scalarizer.after_step(step, now)

    def state(self) -> dict[str, Any]:
        """See `Balancer.state`."""
        return {**super().state(), "method": self.scalarizer.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Balancer.load_state`."""
        super().load_state(state)
        self.scalarizer.load_state(state["method"], self.weights.device)


class GradientBalancer(Balancer):
    """Weights from the Gramian of the tasks' gradients, recorded in one backward pass.

    Args:
        config: The method.
        num_tasks: K.
        num_parameters: Trainable parameters of the model, to decide whether K gradients may be kept.
    """

    def __init__(self, config: BalancingConfig, num_tasks: int, num_parameters: int) -> None:
        super().__init__(num_tasks)
        self.config = config
        self.weighting = GramianWeights(config, num_tasks)
        fits = num_tasks * num_parameters * 4 <= config.keep_megabytes * 2**20
        self.keeps_gradients = config.gradients == "keep" or (config.gradients == "auto" and fits)

    def measures(self, step: int, first_batch: bool) -> bool:
        """See `Balancer.measures`."""
        return first_batch and step % self.config.every_n_steps == 0

    @contextlib.contextmanager
    def watch(self, model: nn.Module, situation: Situation) -> Iterator[ToLoss]:
        """See `Balancer.watch`."""
        self.gramian = None
        if not self.measures(situation.step, situation.first_batch):
            yield lambda losses: self._weighted(losses, situation.task)
            return
        group = split_tasks(situation.task, self.num_tasks, situation.halves)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rows = RowCollector(parameters, self.num_tasks, situation.halves) if self.keeps_gradients else None
        num_groups = self.num_tasks * situation.halves
        recorder = SeparateRecorder(
            model,
            group,
            num_groups,
            scale=torch.full((num_groups,), 1 / situation.loss_scale, dtype=torch.float64, device=group.device),
            processes=self.config.processes,
            collector=rows,
        )
        with recorder:
            yield lambda losses: self._balanced(losses, situation, recorder, rows, parameters)

    def _balanced(
        self,
        losses: Tensor,
        situation: Situation,
        recorder: SeparateRecorder,
        rows: RowCollector | None,
        parameters: list[nn.Parameter],
    ) -> Tensor:
        """Measures, finds new weights, and gives the loss whose gradient is the combination."""
        plain = losses.mean()
        self.gramian = recorder.measure(plain * situation.loss_scale, keep_graph=rows is None)
        products = _averaged(self.gramian.total()) if self.config.processes == "local" else self.gramian.total()
        counts = _averaged(self.gramian.counts.double()) if self.config.processes == "local" else self.gramian.counts
        tasks = task_gramian(products, counts, self.num_tasks)
        if bool(tasks.isfinite().all()) and bool((torch.diagonal(tasks) > 0).all()):
            self.weights = self.weighting(tasks, *situation.entropy) * self.num_tasks
        if rows is None:
            return self._weighted(losses, situation.task)
        if self.gramian.coverage < 1:
            raise RuntimeError(
                f"the gradients of {', '.join(self.gramian.uncovered)} cannot be split by task: set "
                "balancing.gradients to second_pass"
            )
        gradients = [
            (self.weights.to(own.dtype) @ own / situation.loss_scale).view_as(parameter).to(parameter.dtype)
            for own, parameter in zip(rows.rows, parameters, strict=True)
        ]
        return GivenGradient.apply(self._weighted(losses.detach(), situation.task), gradients, *parameters)

    def _weighted(self, losses: Tensor, task: Tensor) -> Tensor:
        return (self.weights[task].to(losses) * losses).mean()

    def state(self) -> dict[str, Any]:
        """See `Balancer.state`."""
        return {**super().state(), "method": self.weighting.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Balancer.load_state`."""
        super().load_state(state)
        self.weighting.load_state(state["method"])


def build_balancer(config: BalancingConfig, num_tasks: int, num_parameters: int) -> Balancer:
    """The balancer of a method, for K tasks and a model with so many trainable parameters.

    Raises:
        UserInputError: If packages that the method needs are not installed.
    """
    if config.method == "none":
        return PlainTraining(num_tasks)
    if config.uses_gradients:
        return GradientBalancer(config, num_tasks, num_parameters)
    return LossBalancer(config, num_tasks)


def task_gramian(products: Tensor, counts: Tensor, num_tasks: int) -> Tensor:
    """The Gramian (K, K) of the tasks' losses, K times their parts of the training loss, from that of mean losses.

    Args:
        products: (G, G) of the mean losses of the groups, which are a task's halves.
        counts: Samples per group (G,).
        num_tasks: K.
    """
    share = counts.to(products) * (num_tasks / counts.sum()).to(products)
    groups = products * share[:, None] * share
    halves = len(counts) // num_tasks
    return groups.view(num_tasks, halves, num_tasks, halves).sum((1, 3))


def _averaged(values: Tensor) -> Tensor:
    """The average over processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
