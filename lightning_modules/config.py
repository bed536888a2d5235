"""Settings of a denoiser that belong to no single component: tasks, optimisation, validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from lightning_modules.errors import UserInputError
from lightning_modules.timesteps import TimestepIntervals


@dataclasses.dataclass(frozen=True)
class IntervalConfig:
    """How timesteps are divided into tasks.

    Attributes:
        num_intervals: K, the number of tasks. Ignored when ``bounds`` is given.
        spacing: Equal widths in t (``"uniform"``) or in log-SNR (``"log_snr"``).
        bounds: Explicit bounds, K + 1 integers from 0 to T.
        only: Train this task alone: every training timestep comes from its interval, drawn uniformly, whatever
            the sampler. Such a specialist is what a shared model is held against to find negative transfer
            (``dtr-lab specialists`` trains one for each task). Validation covers all intervals.
    """

    num_intervals: int = 8
    spacing: Literal["uniform", "log_snr"] = "uniform"
    bounds: list[int] | None = None
    only: int | None = None

    def __post_init__(self) -> None:
        if self.spacing not in ("uniform", "log_snr"):
            raise UserInputError(f"intervals.spacing must be 'uniform' or 'log_snr', got {self.spacing!r}")

    def build(self, log_snr: Sequence[float] | Tensor) -> TimestepIntervals:
        """The intervals over the timesteps whose log-SNR is given, length T.

        Raises:
            UserInputError: If there cannot be such intervals, or there is none of the number ``only``.
        """
        intervals = self._build(log_snr)
        if self.only is not None and not 0 <= self.only < intervals.num_intervals:
            raise UserInputError(
                f"intervals.only must name one of {intervals.num_intervals} intervals, 0 to "
                f"{intervals.num_intervals - 1}, got {self.only}"
            )
        return intervals

    def _build(self, log_snr: Sequence[float] | Tensor) -> TimestepIntervals:
        if self.bounds is not None:
            intervals = TimestepIntervals.explicit(self.bounds)
            if intervals.num_timesteps != len(log_snr):
                raise UserInputError(f"intervals.bounds must end at T = {len(log_snr)}, got {self.bounds}")
            return intervals
        if self.spacing == "log_snr":
            return TimestepIntervals.log_snr(log_snr, self.num_intervals)
        return TimestepIntervals.uniform(len(log_snr), self.num_intervals)


@dataclasses.dataclass(frozen=True)
class OptimizationConfig:
    """AdamW, its learning rate, and the average of the weights.

    Attributes:
        learning_rate: Peak learning rate; constant after the warm-up (as DiT and DTR train).
        betas: AdamW's betas.
        weight_decay: AdamW's decoupled weight decay.
        warmup_steps: Steps over which the learning rate rises linearly from zero.
        ema_decay: Decay of the exponential moving average of the weights, reached gradually (see `ema.warm_decay`).
        compile: Compile the backbone with `torch.compile`.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    ema_decay: float = 0.9999
    compile: bool = False

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UserInputError(f"optimization.learning_rate must be positive, got {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserInputError(f"optimization.betas must lie in [0, 1), got {self.betas}")
        if self.weight_decay < 0 or self.warmup_steps < 0:
            raise UserInputError("optimization.weight_decay and optimization.warmup_steps must not be negative")
        if not 0 <= self.ema_decay < 1:
            raise UserInputError(f"optimization.ema_decay must lie in [0, 1), got {self.ema_decay}")


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """The fixed measurement that makes runs comparable point by point.

    Attributes:
        repeats: How many times each held-out image is noised, each time at another t.
        seed: Seed of the noise and of t; the same for all runs that are to be compared.
    """

    repeats: int = 4
    seed: int = 20231012

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise UserInputError(f"validation.repeats must be at least 1, got {self.repeats}")
