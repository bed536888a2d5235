"""Noise schedules and everything that follows from them, in float64.

Notation of DDPM (Ho et al., 2020, arXiv 2006.11239): ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`` with
``abar_t = prod_{s <= t} (1 - beta_s)``. Timesteps are counted from 0, so ``t = 0`` is the least noisy one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_modules.errors import UserInputError

ScheduleName = Literal["linear", "scaled_linear", "cosine"]

MAX_BETA = 0.999
"""Upper bound of every beta, so that no schedule reaches SNR = 0 (improved DDPM, section 3.2)."""

FloatArray = NDArray[np.float64]


def schedule_betas(name: ScheduleName, num_timesteps: int) -> FloatArray:
    """The betas of a named schedule.

    - ``linear``: DDPM, 0.0001 to 0.02 at T = 1000.
    - ``scaled_linear``: Stable Diffusion, linear in ``sqrt(beta)`` from 0.00085 to 0.012 at T = 1000.
    - ``cosine``: improved DDPM (Nichol & Dhariwal, 2021, arXiv 2102.09672, equation 17).

    For another T, the first two multiply their betas by 1000 / T, which leaves the noise level at the end of
    the chain about where it was; with very few timesteps this exceeds `MAX_BETA`, where the betas are cut off.

    Args:
        name: The schedule.
        num_timesteps: T, at least 2.

    Returns:
        Betas of shape ``(T,)``, each in ``(0, MAX_BETA]``.

    Raises:
        UserInputError: For an unknown name or T < 2.
    """
    if num_timesteps < 2:
        raise UserInputError(f"num_timesteps is {num_timesteps}: a diffusion needs at least 2 timesteps")
    scale = 1000 / num_timesteps
    if name == "linear":
        betas: FloatArray = np.linspace(scale * 0.0001, scale * 0.02, num_timesteps)
    elif name == "scaled_linear":
        ends = math.sqrt(scale * 0.00085), math.sqrt(scale * 0.012)
        betas = np.linspace(*ends, num_timesteps) ** 2
    elif name == "cosine":
        edges = np.arange(num_timesteps + 1) / num_timesteps
        survival = np.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - survival[1:] / survival[:-1]
    else:
        raise UserInputError(f"unknown noise schedule {name!r}: choose one of {', '.join(get_args(ScheduleName))}")
    return np.minimum(betas, MAX_BETA)


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A noise schedule and its derived coefficients, each a float64 array of shape ``(T,)``.

    Attributes:
        betas: Variances of the forward steps, each in ``(0, 1)``.
    """

    betas: FloatArray

    @classmethod
    def named(cls, name: ScheduleName, num_timesteps: int) -> NoiseSchedule:
        """The schedule of that name (see `schedule_betas`, also for the errors raised)."""
        return cls(schedule_betas(name, num_timesteps))

    @functools.cached_property
    def alphas_cumprod(self) -> FloatArray:
        """``abar_t``, the share of the signal's variance that is left."""
        return np.cumprod(1 - self.betas, dtype=np.float64)

    @functools.cached_property
    def alphas_cumprod_prev(self) -> FloatArray:
        """``abar_{t-1}``, with 1 before the first step."""
        return np.concatenate([[1.0], self.alphas_cumprod[:-1]])

    @functools.cached_property
    def snr(self) -> FloatArray:
        """Signal-to-noise ratio ``abar_t / (1 - abar_t)``."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_variance(self) -> FloatArray:
        """Variance of ``q(x_{t-1} | x_t, x_0)`` (DDPM, equation 7); 0 at t = 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_log_variance(self) -> FloatArray:
        """Logarithm of `posterior_variance`; t = 0, where it would be minus infinity, gets the value of t = 1."""
        return np.log(np.concatenate([self.posterior_variance[1:2], self.posterior_variance[1:]]))

    @functools.cached_property
    def large_log_variance(self) -> FloatArray:
        """Logarithm of the upper choice ``beta_t`` (DDPM's "fixed large"), with the posterior's value at t = 0.

        At t = 0 ``beta_0`` would give a needlessly poor decoder likelihood (DDPM and improved DDPM do the same).
        """
        return np.log(np.concatenate([self.posterior_variance[1:2], self.betas[1:]]))

    @functools.cached_property
    def posterior_mean_x0(self) -> FloatArray:
        """Coefficient of ``x_0`` in the mean of ``q(x_{t-1} | x_t, x_0)`` (DDPM, equation 7)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_mean_xt(self) -> FloatArray:
        """Coefficient of ``x_t`` in the mean of ``q(x_{t-1} | x_t, x_0)`` (DDPM, equation 7)."""
        return (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)
