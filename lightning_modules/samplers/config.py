"""Settings of the samplers of training timesteps."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from lightning_modules.errors import UserInputError

SamplerName = Literal["stratified", "uniform", "log_normal", "loss_second_moment", "gradient_noise", "speed"]
GradientMoment = Literal["second_moment", "variance"]


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Which sampler draws training's timesteps, and its parameters (those of the other samplers are ignored).

    Attributes:
        name: ``stratified`` (equal counts per task), ``uniform``, ``log_normal`` (EDM), ``loss_second_moment``
            (improved DDPM), ``gradient_noise`` (tasks by the size of a sample's gradient) or ``speed`` (SpeeD).
        log_normal_mean: Mean of ln sigma, EDM's P_mean; sigma is the ratio of noise to signal.
        log_normal_std: Standard deviation of ln sigma, EDM's P_std.
        loss_second_moment_history: Losses that each timestep remembers; until all have as many, t is uniform.
        loss_second_moment_uniform: Share of the uniform distribution that is mixed in, in (0, 1].
        gradient_noise_decay: Decay of the averages over measurements, in [0, 1); 0 keeps the last one alone.
        gradient_noise_floor: Share of the uniform distribution that is mixed in, in (0, 1].
        gradient_noise_moment: ``second_moment`` of a sample's gradient, or its ``variance`` alone (see
            `GradientNoiseSampler` for when each is the best).
        speed_k: SpeeD's suppression intensity k: a timestep before tau is k times as likely as one after it.
        speed_tau: SpeeD's tau, the number of timesteps before the convergence area; None: from the noise schedule.
        speed_magnitude: SpeeD's magnitude r, by which tau is found: the convergence area begins where the signal's
            share of the variance has fallen to 1 / r. 144 gives the authors' tau = 700 for ``linear`` with T = 1000.

    Raises:
        UserInputError: For an unknown name, or a parameter outside its range.
    """

    name: SamplerName = "stratified"
    log_normal_mean: float = -1.2
    log_normal_std: float = 1.2
    loss_second_moment_history: int = 10
    loss_second_moment_uniform: float = 0.001
    gradient_noise_decay: float = 0.9
    gradient_noise_floor: float = 0.1
    gradient_noise_moment: GradientMoment = "second_moment"
    speed_k: float = 5.0
    speed_tau: int | None = None
    speed_magnitude: float = 144.0

    def __post_init__(self) -> None:
        for field, options in (("name", get_args(SamplerName)), ("gradient_noise_moment", get_args(GradientMoment))):
            if getattr(self, field) not in options:
                raise UserInputError(f"sampler.{field} is {getattr(self, field)!r}: choose one of {', '.join(options)}")
        self._require("log_normal_mean", math.isfinite(self.log_normal_mean), "a finite number")
        self._require("log_normal_std", 0 < self.log_normal_std < math.inf, "a positive number")
        self._require("loss_second_moment_history", self.loss_second_moment_history >= 1, "at least 1")
        for field in ("loss_second_moment_uniform", "gradient_noise_floor"):
            self._require(field, 0 < getattr(self, field) <= 1, "above 0, for no timestep to starve, and at most 1")
        self._require("gradient_noise_decay", 0 <= self.gradient_noise_decay < 1, "at least 0 and below 1")
        self._require("speed_k", 1 <= self.speed_k < math.inf, "at least 1")
        self._require("speed_tau", self.speed_tau is None or self.speed_tau >= 1, "at least 1, or null")
        self._require("speed_magnitude", 1 < self.speed_magnitude < math.inf, "above 1")

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserInputError(f"sampler.{field} is {getattr(self, field)}: it must be {rule}")
