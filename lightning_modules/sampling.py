"""Sampling: DDPM's ancestral steps and DDIM on diffusers' schedulers, with classifier-free guidance.

With fewer steps than timesteps the chain is respaced as in improved DDPM (Nichol & Dhariwal, 2021, section 4): the
sampled timesteps become the consecutive steps of a shorter chain, whose betas follow from the original ``abar``. The
schedulers then only see consecutive steps, which also keeps DDIM right where the number of steps does not divide T.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from rich.progress import track
from torch import Tensor

from lightning_modules.diffusion import GaussianDiffusion
from lightning_modules.errors import UserInputError

SamplingMethod = Literal["ddpm", "ddim"]

_PREDICTION_TYPE = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


class Denoiser(Protocol):
    """What is sampled from; guidance also needs its attribute ``null_class`` (int)."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Noised data (B, C, H, W), timesteps (B,) and labels (B,) -> network output (B, C or 2C, H, W)."""


def respaced_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """The timesteps that a chain of ``steps`` visits: evenly spaced, both ends included, increasing.

    Raises:
        UserInputError: If there are more steps than timesteps, or none.
    """
    if not 1 <= steps <= num_timesteps:
        raise UserInputError(f"steps is {steps}: it must lie between 1 and the model's {num_timesteps} timesteps")
    return np.linspace(num_timesteps - 1, 0, steps).round().astype(int)[::-1].tolist()


def build_scheduler(
    diffusion: GaussianDiffusion, timesteps: list[int], method: SamplingMethod, clip_sample: bool = False
) -> DDPMScheduler | DDIMScheduler:
    """diffusers' scheduler of the chain that visits the given timesteps.

    Args:
        diffusion: The diffusion the model was trained with.
        timesteps: Increasing timesteps; step ``i`` of the scheduler stands for ``timesteps[i]``.
        method: ``ddpm`` uses the diffusion's variance, learned or fixed; ``ddim`` does not.
        clip_sample: Whether each step clips the predicted clean data to ``[-1, 1]``.

    Returns:
        A scheduler whose timesteps are ``len(timesteps) - 1, ..., 0``.

    Raises:
        UserInputError: For an unknown method.
    """
    if method not in get_args(SamplingMethod):
        raise UserInputError(f"unknown sampling method {method!r}: choose one of {', '.join(get_args(SamplingMethod))}")
    signal = diffusion.schedule.alphas_cumprod[timesteps]
    settings = {
        "num_train_timesteps": len(timesteps),
        "trained_betas": 1 - signal / np.concatenate([[1.0], signal[:-1]]),
        "prediction_type": _PREDICTION_TYPE[diffusion.config.target],
        "clip_sample": clip_sample,
    }
    scheduler: DDPMScheduler | DDIMScheduler
    if method == "ddpm":
        scheduler = DDPMScheduler(**settings, variance_type=diffusion.config.variance)
    else:
        scheduler = DDIMScheduler(**settings)
    # diffusers rounds the betas and multiplies them up in float32, which loses digits of abar; ours is exact.
    scheduler.alphas_cumprod = torch.from_numpy(signal)
    scheduler.set_timesteps(len(timesteps))
    return scheduler


def guided_output(
    backbone: Denoiser,
    x: Tensor,
    t: Tensor,
    y: Tensor | None,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
) -> Tensor:
    """The network's output under classifier-free guidance (Ho & Salimans, 2022, arXiv 2207.12598).

    Guided channels are ``unconditional + scale * (conditional - unconditional)``, so 1 is the conditional model (and
    costs one evaluation instead of two). The other channels, variance values included, are the conditional ones.

    Args:
        backbone: The model.
        x: Noised data ``(B, C, H, W)``.
        t: Timesteps ``(B,)``.
        y: Labels ``(B,)``; None for an unconditional model.
        guidance_scale: Strength of the guidance.
        guidance_channels: How many of the C channels are guided; None for all, as in DTR's code. DiT's published
            numbers guide 3 of 4, and the two are not comparable at the same scale.

    Returns:
        Network output ``(B, C or 2C, H, W)``.

    Raises:
        UserInputError: If guidance is asked for without labels, or of an impossible number of channels.
    """
    if guidance_scale == 1:
        return backbone(x, t, y)
    channels = x.shape[1]
    guided = channels if guidance_channels is None else guidance_channels
    if not 1 <= guided <= channels:
        raise UserInputError(f"guidance_channels is {guided}: it must lie between 1 and the data's {channels} channels")
    if y is None:
        raise UserInputError("guidance needs class labels: pass y, or leave guidance_scale at 1")
    null = torch.full_like(y, backbone.null_class)  # type: ignore[attr-defined]
    both = backbone(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
    conditional, unconditional = both.chunk(2)
    difference = conditional[:, :guided] - unconditional[:, :guided]
    return torch.cat([unconditional[:, :guided] + guidance_scale * difference, conditional[:, guided:]], dim=1)


@torch.no_grad()
def sample(
    backbone: Denoiser,
    diffusion: GaussianDiffusion,
    shape: tuple[int, int, int, int],
    *,
    y: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    steps: int = 50,
    method: SamplingMethod = "ddpm",
    eta: float = 0.0,
    clip_sample: bool = False,
    generator: torch.Generator,
    progress: bool = False,
) -> Tensor:
    """Draws samples, starting from standard normal noise, on the device of ``diffusion``.

    Args:
        backbone: The model, in evaluation mode if it distinguishes one.
        diffusion: The diffusion it was trained with.
        shape: ``(B, C, H, W)``.
        y: Labels ``(B,)``; None for an unconditional model.
        guidance_scale: Strength of classifier-free guidance; 1 for none.
        guidance_channels: How many channels are guided, see `guided_output`.
        steps: Number of network evaluations (twice as many under guidance), at most T.
        method: ``ddpm`` (ancestral, with the learned variance if there is one) or ``ddim``.
        eta: DDIM's noise, between 0 (deterministic) and 1 (ancestral). Song et al., 2021, equation 16.
        clip_sample: Whether each step clips the predicted clean data to ``[-1, 1]``. For pixels it steadies few-step
            sampling, above all with the cosine schedule, whose last timesteps amplify errors; latents are not bounded.
        generator: Source of all randomness. A CPU generator gives the same noise whatever the device.
        progress: Whether to show a progress bar.

    Returns:
        Samples ``(B, C, H, W)``, float32.

    Raises:
        UserInputError: If an argument is out of range.
        ValueError: If the network's output does not fit the diffusion's variance, or guidance lacks a null class.
    """
    _check_arguments(shape, y, guidance_scale, method, eta)
    timesteps = respaced_timesteps(diffusion.num_timesteps, steps)
    scheduler = build_scheduler(diffusion, timesteps, method, clip_sample)
    device = diffusion.snr.device
    x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    for step in track(scheduler.timesteps.tolist(), description="Sampling", disable=not progress):
        t = torch.full(shape[:1], timesteps[step], device=device)
        output = guided_output(backbone, x, t, y, guidance_scale, guidance_channels).to(x.dtype)
        prediction, _ = diffusion.split_output(output, shape[1])
        if isinstance(scheduler, DDIMScheduler):
            # Clipping x_0 must carry over to the noise, or the two no longer make up x_t.
            ddim = {"eta": eta, "use_clipped_model_output": clip_sample}
            x, *_ = scheduler.step(prediction, step, x, generator=generator, **ddim, return_dict=False)
        else:
            x, *_ = scheduler.step(output, step, x, generator=generator, return_dict=False)
    return x


def _check_arguments(
    shape: tuple[int, ...], y: Tensor | None, guidance_scale: float, method: SamplingMethod, eta: float
) -> None:
    """Raises UserInputError for what the rest of `sample` would not notice, or not name."""
    if y is not None and y.shape != shape[:1]:
        raise UserInputError(f"labels of shape {tuple(y.shape)} do not fit {shape[0]} samples")
    if not math.isfinite(guidance_scale):
        raise UserInputError(f"guidance_scale is {guidance_scale}: it must be a finite number")
    if not 0 <= eta <= 1:
        raise UserInputError(f"eta is {eta}: it must lie in [0, 1]")
    if eta and method != "ddim":
        raise UserInputError(f"eta is DDIM's noise: use method 'ddim', or leave eta at 0 with {method!r}")
