"""Loss weights per timestep, right for whichever target the network predicts.

The three targets' errors are the same error in different units: with SNR = abar / (1 - abar),
``|eps error|^2 = SNR |x0 error|^2`` and ``|v error|^2 = (SNR + 1) |x0 error|^2``. A weighting defined for one target
is therefore converted, not reused, for another. Weights multiply the mean squared error, never the variational term.

`timestep_weights` gives the weights of all timesteps of a diffusion. `loss_weight` gives those that the SNR alone
decides, for any SNR.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_modules.diffusion import GaussianDiffusion, Target
from lightning_modules.errors import UserInputError

WeightName = Literal["uniform", "min_snr", "p2", "speed", "edm2"]


@dataclasses.dataclass(frozen=True)
class LossWeightConfig:
    """Which weighting, and its parameters (those of the other weightings are ignored).

    Attributes:
        name: ``uniform`` (the plain error of the target), ``min_snr``, ``p2``, ``speed`` (SpeeD's change-aware
            weighting), or ``edm2`` (learned: see `uncertainty.LogSnrUncertainty`; the weights of this file are 1).
        min_snr_gamma: Min-SNR's gamma, at which the SNR is cut off.
        p2_gamma: P2's exponent; 0 gives the plain error of epsilon.
        p2_k: P2's offset.
        speed_lambda: SpeeD's lambda, in [0.5, 1]: weights lie between 1 - lambda and lambda.
        edm2_channels: Fourier features of the log-SNR from which EDM2's uncertainty is predicted.
        edm2_learning_rate: Learning rate of the uncertainty. EDM2 trains it with all other weights, by Adam; 0.01 is
            the peak for its model S (alpha_ref of the preset edm2-img512-s).

    Raises:
        UserInputError: For an unknown name, or a parameter outside its range.
    """

    name: WeightName = "uniform"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    speed_lambda: float = 0.6
    edm2_channels: int = 128
    edm2_learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if self.name not in get_args(WeightName):
            options = ", ".join(get_args(WeightName))
            raise UserInputError(f"unknown loss weight {self.name!r}: choose one of {options}")
        for field in ("min_snr_gamma", "p2_k", "edm2_learning_rate"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise UserInputError(f"{field} is {value}: it must be a positive number")
        if not (math.isfinite(self.p2_gamma) and self.p2_gamma >= 0):
            raise UserInputError(f"p2_gamma is {self.p2_gamma}: it must be a number of at least 0")
        if not 0.5 <= self.speed_lambda <= 1:
            raise UserInputError(f"speed_lambda is {self.speed_lambda}: it must lie between 0.5 and 1")
        if self.edm2_channels < 1:
            raise UserInputError(f"edm2_channels is {self.edm2_channels}: it must be at least 1")


def timestep_weights(config: LossWeightConfig, diffusion: GaussianDiffusion) -> Tensor:
    """The factor for the mean squared error at each timestep.

    Args:
        config: The weighting.
        diffusion: Its noise schedule, and what the network predicts.

    Returns:
        Finite weights ``(T,)``, of the type of ``diffusion.snr`` and on its device.
    """
    target = diffusion.config.target
    if config.name != "speed":
        return loss_weight(config, diffusion.snr, target)
    on_epsilon = _change_aware(diffusion.schedule.alphas_cumprod, config.speed_lambda)
    snr = torch.as_tensor(diffusion.schedule.snr)
    on_target = {"epsilon": on_epsilon, "x0": on_epsilon * snr, "v": on_epsilon * snr / (snr + 1)}[target]
    return on_target.to(diffusion.snr)


def loss_weight(config: LossWeightConfig, snr: Tensor, target: Target) -> Tensor:
    """The factor for each sample's mean squared error, where its SNR alone decides.

    Args:
        config: The weighting.
        snr: Signal-to-noise ratio of each sample, ``(B,)``, at least 0; 0 and infinity are allowed.
        target: What the network predicts.

    Returns:
        Finite weights ``(B,)`` of the type of ``snr``.

    Raises:
        UserInputError: For an unknown target.
        ValueError: For ``speed``, which depends on how the SNR changes with t: see `timestep_weights`.
    """
    if target not in get_args(Target):
        raise UserInputError(f"unknown target {target!r}: choose one of {', '.join(get_args(Target))}")
    if config.name == "speed":
        raise ValueError("the weights of SpeeD depend on the noise schedule: use timestep_weights")
    if config.name in ("uniform", "edm2"):
        return torch.ones_like(snr)
    snr = snr.clamp(max=torch.finfo(snr.dtype).max)
    if config.name == "min_snr":
        return _min_snr(snr, config.min_snr_gamma, target)
    return _p2(snr, config.p2_gamma, config.p2_k, target)


def _min_snr(snr: Tensor, gamma: float, target: Target) -> Tensor:
    """Min-SNR (Hang et al., 2023, arXiv 2303.09556): ``min(SNR, gamma)`` on the error of x0."""
    if target == "x0":
        return snr.clamp(max=gamma)
    if target == "epsilon":
        return gamma / snr.clamp(min=gamma)  # = min(gamma / SNR, 1), without dividing by SNR = 0
    return snr.clamp(max=gamma) / (snr + 1)


def _p2(snr: Tensor, gamma: float, k: float, target: Target) -> Tensor:
    """P2 (Choi et al., 2022, arXiv 2204.00227): ``1 / (k + SNR)^gamma`` on the error of epsilon."""
    if target == "epsilon":
        return (k + snr) ** -gamma
    # SNR / (k + SNR) first: forming SNR * (k + SNR)^-gamma at once can give 0 * large or overflow on the way.
    if target == "x0":
        return snr / (k + snr) * (k + snr) ** (1 - gamma)
    return snr / (snr + 1) * (k + snr) ** -gamma


def _change_aware(alphas_cumprod: np.ndarray, symmetry: float) -> Tensor:
    """SpeeD (Wang et al., CVPR 2025, arXiv 2405.17403): weights on the error of epsilon, float64, (T,).

    The derivative by t of the variance of the process increment ``x_{t+1} - x_t``, taken to be
    ``2 - abar_t - abar_{t+1}``, about ``2 (1 - abar_t)`` (from memory: the paper could not be opened here); scaled to
    reach from ``1 - lambda`` (its least value) to ``lambda`` (its greatest). As the authors' code does, this takes
    differences of abar itself, for any schedule. Their code then sets the weights from tau on to 1, more than any
    other; this does not.
    """
    change = torch.as_tensor(np.gradient(1 - alphas_cumprod))
    spread = (change.max() - change.min()).clamp(min=torch.finfo(change.dtype).tiny)  # T = 2 has one change only
    return (1 - symmetry) + (2 * symmetry - 1) * (change - change.min()) / spread
