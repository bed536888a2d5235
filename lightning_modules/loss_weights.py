"""Loss weights per timestep, right for whichever target the network predicts.

The three targets' errors are the same error in different units: with SNR = abar / (1 - abar),
``|eps error|^2 = SNR |x0 error|^2`` and ``|v error|^2 = (SNR + 1) |x0 error|^2``. A weighting defined for one target
is therefore converted, not reused, for another. Weights multiply the mean squared error, never the variational term.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_modules.diffusion import Target
from lightning_modules.errors import UserInputError

WeightName = Literal["uniform", "min_snr", "p2"]


@dataclasses.dataclass(frozen=True)
class LossWeightConfig:
    """Which weighting, and its parameters (those of the other weightings are ignored).

    Attributes:
        name: ``uniform`` (the plain error of the target), ``min_snr`` or ``p2``.
        min_snr_gamma: Min-SNR's gamma, at which the SNR is cut off.
        p2_gamma: P2's exponent; 0 gives the plain error of epsilon.
        p2_k: P2's offset.

    Raises:
        UserInputError: For an unknown name, or a parameter outside its range.
    """

    name: WeightName = "uniform"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in get_args(WeightName):
            options = ", ".join(get_args(WeightName))
            raise UserInputError(f"unknown loss weight {self.name!r}: choose one of {options}")
        for field in ("min_snr_gamma", "p2_k"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise UserInputError(f"{field} is {value}: it must be a positive number")
        if not (math.isfinite(self.p2_gamma) and self.p2_gamma >= 0):
            raise UserInputError(f"p2_gamma is {self.p2_gamma}: it must be a number of at least 0")


def loss_weight(config: LossWeightConfig, snr: Tensor, target: Target) -> Tensor:
    """The factor for each sample's mean squared error.

    Args:
        config: The weighting.
        snr: Signal-to-noise ratio of each sample, ``(B,)``, at least 0; 0 and infinity are allowed.
        target: What the network predicts.

    Returns:
        Finite weights ``(B,)`` of the type of ``snr``.

    Raises:
        UserInputError: For an unknown target.
    """
    if target not in get_args(Target):
        raise UserInputError(f"unknown target {target!r}: choose one of {', '.join(get_args(Target))}")
    if config.name == "uniform":
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
