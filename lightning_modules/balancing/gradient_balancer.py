"""Multi-task methods that look at the inner products between the tasks' gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.balancing.balancer import Balancer, Situation, ToLoss, average_over_processes
from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.balancing.gramian_weights import GramianWeights
from lightning_modules.errors import UserInputError
from lightning_modules.gradients.gramian import Gramian, trained_parameters
from lightning_modules.gradients.separate import GivenGradient, RowCollector, SeparateRecorder


class GradientBalancer(Balancer):
    """Weights from the Gramian of the tasks' gradients, recorded in one backward pass.

    A batch without samples of some task leaves the weights as they were.

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
        # Gradients can be combined only if all are split. Who leaves the choice to us pays a second pass to find out.
        self._trusted = config.gradients == "keep"

    @contextlib.contextmanager
    def watch(self, model: nn.Module, situation: Situation) -> Iterator[ToLoss]:
        """See `Balancer.watch`."""
        if not situation.first_batch or situation.step % self.config.every_n_steps:
            with super().watch(model, situation) as to_loss:
                yield to_loss
            return
        halves = 1 if situation.request is None else situation.request.halves
        parameters = list(trained_parameters(model).values())
        keeps = self.keeps_gradients and self._trusted
        rows = RowCollector(parameters, self.num_tasks, halves) if keeps else None
        recorder = self._recorder(model, situation, halves, self.config.processes, rows)
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
        self.gramian = recorder.measure(losses.mean() * situation.loss_scale, keep_graph=rows is None)
        self._check_coverage(self.gramian)
        tasks = task_gramian(self.gramian.total(), self.gramian.counts, self.num_tasks)
        if self.config.processes == "local":
            tasks = average_over_processes(tasks)
        if bool(tasks.isfinite().all()) and bool((torch.diagonal(tasks) > 0).all()):
            self.weights = self.weighting(tasks, *situation.entropy) * self.num_tasks
        if rows is None:
            return self.loss(losses, situation)
        gradients = [
            (self.weights.to(own.dtype) @ own / situation.loss_scale).view_as(parameter).to(parameter.dtype)
            for own, parameter in zip(rows.rows, parameters, strict=True)
        ]
        return GivenGradient.apply(self.loss(losses.detach(), situation), gradients, *parameters)

    def _check_coverage(self, gramian: Gramian) -> None:
        """Decides from what could be split whether gradients may be kept.

        Raises:
            UserInputError: If they may not, but must.
        """
        if gramian.coverage < 1 and self.config.gradients == "keep":
            raise UserInputError(
                f"balancing.gradients keep: the gradients of {', '.join(gramian.uncovered)} cannot be split by task; "
                "set it to second_pass"
            )
        if gramian.coverage < 1 and not self._trusted:
            self.keeps_gradients = False
        self._trusted = True

    def loss(self, losses: Tensor, situation: Situation) -> Tensor:
        """See `Balancer.loss`: with the weights as they are."""
        return (self.weights[situation.task].to(losses) * losses).mean()

    def state(self) -> dict[str, Any]:
        """See `Balancer.state`."""
        kept = {"keeps": self.keeps_gradients, "trusted": self._trusted}
        return {**super().state(), **kept, "method": self.weighting.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Balancer.load_state`."""
        super().load_state(state)
        self.keeps_gradients, self._trusted = state["keeps"], state["trusted"]
        self.weighting.load_state(state["method"])


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
