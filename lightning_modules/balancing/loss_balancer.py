"""Multi-task methods that look at the tasks' losses alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_modules.balancing.balancer import Balancer, Situation, average_over_processes
from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.balancing.scalarizers import LossScalarizer


class LossBalancer(Balancer):
    """Weights from the tasks' losses.

    A task without samples in a batch counts with the loss it had last. Until all have been seen, training is plain.

    Args:
        config: The method.
        num_tasks: K.
    """

    def __init__(self, config: BalancingConfig, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.scalarizer = LossScalarizer(config, num_tasks)
        self._task = torch.zeros(0, dtype=torch.long)
        self._scored = False
        self.register_buffer("_latest", torch.full((num_tasks,), torch.nan), persistent=False)

    _latest: Tensor

    def loss(self, losses: Tensor, situation: Situation) -> Tensor:
        """See `Balancer.loss`."""
        self._task = situation.task
        own = self.task_losses(losses, situation.task)
        everywhere = self._completed(own.detach())
        # Not finite: a task was never seen, or losses overflow under fp16, which the scaler deals with.
        self._scored = bool(everywhere.isfinite().all())
        if not self._scored:
            return losses.mean() + 0 * sum(parameter.sum() for parameter in self.parameters())
        self._latest = everywhere
        value, weights = self.scalarizer(everywhere, *situation.entropy)
        self.weights = weights * self.num_tasks
        # The value of the first term is left out: it is in the second, which carries learned weights' gradients.
        model_part = (weights.to(own) * own).sum()
        return model_part - model_part.detach() + value

    def _completed(self, own: Tensor) -> Tensor:
        """The tasks' losses over all processes, those without samples as they were last."""
        counts = average_over_processes(torch.bincount(self._task, minlength=self.num_tasks).to(own))
        return torch.where(counts > 0, average_over_processes(own), self._latest.to(own))

    def after_step(self, step: int, losses: Callable[[], Tensor]) -> None:
        """See `Balancer.after_step`."""

        def now() -> Tensor:
            return self._completed(self.task_losses(losses(), self._task))

        if self._scored:
            self.scalarizer.after_step(step, now)

    def state(self) -> dict[str, Any]:
        """See `Balancer.state`."""
        return {**super().state(), "latest": self._latest.clone(), "method": self.scalarizer.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Balancer.load_state`."""
        super().load_state(state)
        self._latest = state["latest"].to(self.weights.device)
        self.scalarizer.load_state(state["method"])
