"""The balancer that a configuration names."""

from __future__ import annotations

from lightning_modules.balancing.balancer import Balancer, PlainTraining
from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.balancing.gradient_balancer import GradientBalancer
from lightning_modules.balancing.loss_balancer import LossBalancer


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
