"""Weights of the tasks from their losses alone, by TorchJD's scalarizers.

Sources: uncertainty weighting UW (Kendall et al., CVPR 2018; for diffusion ANT, arXiv 2306.00354), IMTL-L (Liu et al.,
ICLR 2021), DWA (Liu et al., CVPR 2019), FAMO (arXiv 2306.03792), smooth Tchebycheff STCH (2402.19078), geometric mean
(MultiNet++, CVPRW 2019), random weights RLW (2111.10603).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.seeding import seeded_global

SUMS_OF_LOSSES = frozenset({"uw", "imtl_l", "dwa"})
"""Methods that add up the tasks' losses. They are given L_k / K, as in ANT, so that unit weights are the plain loss."""
LEARNED = frozenset({"uw", "imtl_l"})
"""Methods whose weights are learned by the optimizer, together with the model."""


class LossScalarizer(nn.Module):
    """One method: losses (K,) -> a number whose gradient by them are the weights.

    Args:
        config: Its parameters.
        num_tasks: K.
    """

    def __init__(self, config: BalancingConfig, num_tasks: int) -> None:
        super().__init__()
        self.method = config.method
        self.num_tasks = num_tasks
        self.window_steps = config.dwa_window_steps
        scalarizer = _scalarizer(config, num_tasks)
        if self.method in LEARNED:
            self.learned = scalarizer
        # A tuple hides it: what FAMO learns by itself is no business of our optimizer, or of distributed training.
        self._hidden: tuple[Any] = (scalarizer,)

    def forward(self, losses: Tensor, *entropy: int) -> tuple[Tensor, Tensor]:
        """The number that is minimised, with a graph to the learned weights, and the weights (K,), without one.

        Args:
            losses: The tasks' losses (K,), averaged over processes.
            entropy: Integers that random weights follow from.
        """
        # On the CPU random weights are drawn from a generator that can be seeded without others noticing.
        place = torch.device("cpu") if self.method == "random_weights" else losses.device
        leaf = losses.detach().float().to(place).requires_grad_()
        self._follow(place)
        with torch.enable_grad(), seeded_global(*entropy):
            value = self._hidden[0](leaf / self.num_tasks if self.method in SUMS_OF_LOSSES else leaf)
            if self.method == "stch":  # its weights add up to 1 / K, those of other means to 1
                value = value * self.num_tasks
            (weights,) = torch.autograd.grad(value, leaf, retain_graph=self.method in LEARNED)
        kept = value if self.method in LEARNED else value.detach()
        return kept.to(losses.device), weights.detach().to(losses.device)

    def _follow(self, device: torch.device) -> None:
        """Moves what DWA and FAMO remember outside of buffers to where the losses are."""
        scalarizer = self._hidden[0]
        if self.method == "dwa":
            total = scalarizer._loss_sum
            scalarizer._loss_sum = None if total is None else total.to(device)
            scalarizer._previous_averages = [average.to(device) for average in scalarizer._previous_averages]
        elif self.method == "famo" and scalarizer._optimizer is not None:
            for state in scalarizer._optimizer.state.values():
                state |= {name: value.to(device) for name, value in state.items() if name.startswith("exp_avg")}

    def after_step(self, step: int, losses: Any) -> None:
        """Learns from what a step did.

        Args:
            step: Completed optimizer steps.
            losses: A function that gives the tasks' losses (K,) of the step's batch anew, called where they are
                needed: by FAMO.
        """
        scalarizer = self._hidden[0]
        if self.method == "famo":
            after = losses().float()
            if bool(after.isfinite().all()):
                scalarizer.update(after)
        elif self.method == "dwa" and step % self.window_steps == 0:
            scalarizer.step()

    def state(self) -> dict[str, Any]:
        """What the method remembers besides the module's own state dict, for a checkpoint."""
        scalarizer = self._hidden[0]
        if self.method == "dwa":
            total = scalarizer._loss_sum
            return {
                "sum": None if total is None else total.clone(),
                "batches": scalarizer._n_batches,
                "averages": [average.clone() for average in scalarizer._previous_averages],
            }
        if self.method == "famo":
            optimizer = scalarizer._optimizer
            return {
                "logits": scalarizer._w.detach().clone(),
                "optimizer": None if optimizer is None else copy.deepcopy(optimizer.state_dict()),
            }
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave; where it is on another device, it follows at the first use."""
        scalarizer = self._hidden[0]
        if self.method == "dwa":
            scalarizer._loss_sum = state["sum"]
            scalarizer._n_batches = state["batches"]
            scalarizer._previous_averages = list(state["averages"])
        elif self.method == "famo":
            with torch.no_grad():
                scalarizer._w.copy_(state["logits"])
            if state["optimizer"] is not None:
                scalarizer._optimizer = torch.optim.Adam(
                    [scalarizer._w], lr=scalarizer.lr, weight_decay=scalarizer.weight_decay
                )
                scalarizer._optimizer.load_state_dict(state["optimizer"])

    def _apply(self, fn: Any, recurse: bool = True) -> LossScalarizer:
        if self.method not in LEARNED:
            self._hidden[0]._apply(fn)
        return super()._apply(fn, recurse)


def _scalarizer(config: BalancingConfig, num_tasks: int) -> nn.Module:
    from torchjd import scalarization

    if config.method == "famo":
        return scalarization.FAMO(num_tasks, lr=config.learning_rate)
    if config.method == "dwa":
        return scalarization.DWA(temperature=config.dwa_temperature)
    if config.method == "stch":
        return scalarization.STCH(mu=config.stch_mu)
    if config.method == "uw":
        return scalarization.UW(num_tasks)
    if config.method == "imtl_l":
        return scalarization.IMTLL(num_tasks)
    return scalarization.GeometricMean() if config.method == "geometric_mean" else scalarization.Random()
