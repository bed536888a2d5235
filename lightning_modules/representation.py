"""How alike a network's representations of the same images are at different timesteps: unbiased HSIC, for linear CKA.

Linear centred kernel alignment of two representations X, Y (n x p, n x q) of the same n images is
HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) with the kernels XX' and YY' (Kornblith et al., arXiv 1905.00414). The usual
estimate is biased upwards for few images: with p, q much larger than n even independent representations come out alike.
The unbiased estimate HSIC_1 (Song et al., Journal of Machine Learning Research 13, 2012, equation 5) is not, and
adds up over batches, so numerators and denominators are averaged before they are divided (Nguyen, Raghu and Kornblith,
arXiv 2010.15327, equation 3).

Choices, which DTR's paper leaves open for its figure 6:

- the representation is the residual stream behind a block, with all channels; for routed models too, since a masked
  input would be alike or not by its zeros alone;
- all tokens or pixels of an image, flattened (``"flat"``), or their mean (``"pooled"``);
- all timesteps see the same images, and the same noise (``"shared"``: the same images on their way to noise) or noise
  of their own (``"independent"``: what is alike then is what the network knows about the image).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.backbones.backbone import Backbone
from lightning_modules.denoiser import DenoiserModule

Features = Literal["flat", "pooled"]
NoiseKind = Literal["shared", "independent"]
MIN_IMAGES = 4
"""The unbiased estimate divides by n (n - 3)."""


def unbiased_hsic(kernels: Tensor) -> Tensor:
    """HSIC_1 of every two kernels over the same n images.

    [tr(K L) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K L 1] / (n (n - 3)), with the diagonals of K and L set to
    zero. It may be negative.

    Args:
        kernels: (M, n, n), symmetric.

    Returns:
        (M, M), float64.

    Raises:
        ValueError: If there are fewer than `MIN_IMAGES` images.
    """
    n = kernels.shape[-1]
    if n < MIN_IMAGES:
        raise ValueError(f"the unbiased HSIC needs at least {MIN_IMAGES} images, got {n}")
    hollow = kernels.double() * (1 - torch.eye(n, dtype=torch.float64, device=kernels.device))
    rows = hollow.sum(2)
    total = rows.sum(1)
    flat = hollow.flatten(1)
    trace = flat @ flat.T
    means = total[:, None] * total[None, :] / ((n - 1) * (n - 2))
    return (trace + means - 2 / (n - 2) * (rows @ rows.T)) / (n * (n - 3))


class RepresentationMeter:
    """Compares what each block of a network puts out at given timesteps.

    Args:
        module: The diffusion that noises.
        backbone: The network, in evaluation mode.
        timesteps: M timesteps to compare.
        features: What an image's representation is.
        noise: Whether timesteps share their noise.
    """

    def __init__(
        self,
        module: DenoiserModule,
        backbone: Backbone,
        timesteps: Sequence[int],
        *,
        features: Features = "flat",
        noise: NoiseKind = "shared",
    ) -> None:
        self.module = module
        self.backbone = backbone
        self.timesteps = list(timesteps)
        self.features = features
        self.noise = noise

    @torch.no_grad()
    def measure(self, x0: Tensor, y: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        """One batch.

        Args:
            x0: Images (n, C, H, W) on the network's device.
            y: Their labels (n,), or None if the network is unconditional.
            generator: Of the noise, on the CPU.

        Returns:
            Block -> HSIC_1 between timesteps (M, M), on the CPU.
        """
        kernels: dict[str, list[Tensor]] = {}

        def keep(block: str, values: Tensor) -> None:
            kernels.setdefault(block, []).append(self._kernel(values))

        handles = self.backbone.observe_streams(keep)
        try:
            noise = self._draw(x0, generator)
            for number, timestep in enumerate(self.timesteps):
                if number and self.noise == "independent":
                    noise = self._draw(x0, generator)
                t = torch.full((len(x0),), timestep, device=x0.device)
                self.backbone(self.module.diffusion.q_sample(x0, t, noise), t, y)
        finally:
            for handle in handles:
                handle.remove()
        return {block: unbiased_hsic(torch.stack(found)).cpu() for block, found in kernels.items()}

    def _draw(self, x0: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)

    def _kernel(self, values: Tensor) -> Tensor:
        """XX' (n, n) of a stream (n, N, C). HSIC centres the kernel anyway, but large means would cost digits."""
        features = values.mean(1) if self.features == "pooled" else values.flatten(1)
        features = features - features.mean(0)
        return features @ features.T
