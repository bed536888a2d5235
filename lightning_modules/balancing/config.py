"""Which multi-task method combines the tasks' losses or gradients, and its parameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from lightning_modules.errors import UserInputError

LossMethod = Literal["uw", "imtl_l", "dwa", "famo", "stch", "geometric_mean", "random_weights"]
GradientMethod = Literal["pcgrad", "nash_mtl", "cagrad", "mgda", "imtl_g", "aligned_mtl", "upgrad", "config", "gradvac"]
LOSS_METHODS: tuple[str, ...] = get_args(LossMethod)
"""Methods that look at the tasks' losses alone: a step costs what a plain one does (FAMO: one more forward pass)."""
GRADIENT_METHODS: tuple[str, ...] = get_args(GradientMethod)
"""Methods that look at the inner products between the tasks' gradients."""
_USERS = {
    "learning_rate": ("uw", "imtl_l", "famo"),
    "dwa_temperature": ("dwa",),
    "dwa_window_steps": ("dwa",),
    "stch_mu": ("stch",),
    "cagrad_c": ("cagrad",),
    "nash_max_norm": ("nash_mtl",),
    "nash_iterations": ("nash_mtl",),
    "gradvac_beta": ("gradvac",),
}
"""Which methods look at a parameter; gradient methods at all that are not here."""


@dataclasses.dataclass(frozen=True)
class BalancingConfig:
    """Which method, and its parameters. `unused` names those that were set for other methods.

    A task is a timestep interval, and its loss is its part of the training loss, times the number of tasks K: so the
    training loss is the mean of the tasks' losses, whatever the intervals' widths, loss weights or sampling.

    Attributes:
        method: ``none``; by the tasks' losses ``uw``, ``imtl_l``, ``dwa``, ``famo``, ``stch``, ``geometric_mean``,
            ``random_weights``; by the inner products of their gradients ``pcgrad``, ``nash_mtl``, ``cagrad``,
            ``mgda``, ``imtl_g``, ``aligned_mtl``, ``upgrad``, ``config`` (ConFIG), ``gradvac``.
        every_n_steps: Gradient methods find new weights in every n-th step and keep them in between, where a step costs
            what a plain one does (Nash-MTL's authors and ANT: 25).
        gradients: How a gradient method gets the combined gradient. ``keep``: all tasks' gradients are kept, K times
            the parameters, and no backward pass is added. ``second_pass``: one backward pass more, no such memory.
            ``auto``: ``keep`` where that takes at most ``keep_megabytes``.
        keep_megabytes: See ``gradients``.
        processes: Under several processes, ``global`` takes the Gramian of the whole batch's gradients: what one
            process would do, for an all-reduce of all tasks' gradients. ``local`` averages the processes' own
            Gramians, without that traffic; sampling noise then weighs more in their diagonals.
        learning_rate: Of the weights that ``uw``, ``imtl_l`` and ``famo`` learn (ANT and FAMO: 0.025).
        dwa_temperature: DWA's T; larger makes weights more equal.
        dwa_window_steps: Steps that DWA averages losses over; its paper's epoch.
        stch_mu: Smoothing of the smooth Tchebycheff scalarisation; smaller is closer to the largest loss alone.
        cagrad_c: CAGrad's radius c; 0 is the mean gradient.
        nash_max_norm: Bound on the norm of Nash-MTL's gradient; 0 for none.
        nash_iterations: Iterations of Nash-MTL's solver.
        gradvac_beta: Decay of GradVac's cosine targets.

    Raises:
        UserInputError: For an unknown method, or a parameter outside its range.
    """

    method: str = "none"
    every_n_steps: int = 1
    gradients: Literal["auto", "keep", "second_pass"] = "auto"
    keep_megabytes: int = 1024
    processes: Literal["global", "local"] = "global"
    learning_rate: float = 0.025
    dwa_temperature: float = 2.0
    dwa_window_steps: int = 100
    stch_mu: float = 0.1
    cagrad_c: float = 0.4
    nash_max_norm: float = 1.0
    nash_iterations: int = 20
    gradvac_beta: float = 0.5

    def __post_init__(self) -> None:
        options = ("none", *LOSS_METHODS, *GRADIENT_METHODS)
        if self.method not in options:
            raise UserInputError(f"unknown balancing.method {self.method!r}: choose one of {', '.join(options)}")
        if self.gradients not in ("auto", "keep", "second_pass"):
            raise UserInputError(f"balancing.gradients must be 'auto', 'keep' or 'second_pass', got {self.gradients!r}")
        if self.processes not in ("global", "local"):
            raise UserInputError(f"balancing.processes must be 'global' or 'local', got {self.processes!r}")
        for name in ("every_n_steps", "dwa_window_steps", "nash_iterations"):
            if getattr(self, name) < 1:
                raise UserInputError(f"balancing.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "dwa_temperature", "stch_mu"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserInputError(f"balancing.{name} must be a positive number, got {value}")
        for name in ("keep_megabytes", "cagrad_c", "nash_max_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserInputError(f"balancing.{name} must not be negative, got {value}")
        if not 0 <= self.gradvac_beta <= 1:
            raise UserInputError(f"balancing.gradvac_beta must lie in [0, 1], got {self.gradvac_beta}")

    def unused(self) -> list[str]:
        """Names of parameters that differ from their defaults and that the method does not look at."""
        return [
            field.name
            for field in dataclasses.fields(self)
            if field.name != "method"
            and getattr(self, field.name) != field.default
            and self.method not in _USERS.get(field.name, GRADIENT_METHODS)
        ]

    @property
    def uses_gradients(self) -> bool:
        """Whether it is a gradient method."""
        return self.method in GRADIENT_METHODS
