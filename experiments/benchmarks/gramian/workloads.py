"""The models, batches and losses that the methods are measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.backbones.dit import DIT_PRESETS, DiT, DiTConfig, dit_config
from lightning_modules.backbones.unet import UNet, UNetConfig
from lightning_modules.diffusion import DiffusionConfig, GaussianDiffusion
from lightning_modules.errors import UserInputError
from lightning_modules.timesteps import TimestepIntervals

NUM_CLASSES = 10
WEIGHT_NOISE = 0.02
"""Standard deviation of what is added to all weights: freshly initialised models have gradients that are zero."""

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A model, or anything that is called like one: (x, t, y) -> prediction."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """A training batch of B samples, ordered by task, each task with B / K of them.

    Attributes:
        x: Noised images or latents (B, C, H, W).
        t: Timesteps (B,).
        y: Labels (B,).
        noise: What the model should predict (B, C, H, W).
        group: Task of each sample (B,).
        num_groups: K.
    """

    x: Tensor
    t: Tensor
    y: Tensor
    noise: Tensor
    group: Tensor
    num_groups: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, t, y, noise."""
        return self.x, self.t, self.y, self.noise

    def parts(self) -> list[tuple[Tensor, ...]]:
        """``tensors`` of each task, length K."""
        return list(zip(*(tensor.chunk(self.num_groups) for tensor in self.tensors()), strict=True))

    def task_means(self, losses: Tensor) -> Tensor:
        """Mean per task of ``losses`` (B,), shape (K,)."""
        return losses.view(self.num_groups, -1).mean(1)

    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.tensors(), self.group))


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and the batches it is trained on.

    Attributes:
        model: Kind of model, as in the output.
        width: Hidden size of a DiT, base channels of a U-Net.
        batch_size: B.
        sample_shape: (C, H, W).
        build: Makes the model.
    """

    model: str
    width: int
    batch_size: int
    sample_shape: tuple[int, int, int]
    build: Callable[[], nn.Module]

    @property
    def name(self) -> str:
        """What ``--models`` calls it."""
        return self.model if "/" in self.model else f"{self.model}-{self.width}"

    def network(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model at a point in general position, the same whenever it is asked for."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.build()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=WEIGHT_NOISE)
        return network.to(device, dtype).train()

    def batch(self, num_groups: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Batch:
        """A stratified batch over K uniform intervals of 1000 timesteps.

        Raises:
            UserInputError: If K does not divide B: some of the peers need tasks of equal size.
        """
        if self.batch_size % num_groups:
            raise UserInputError(
                f"K = {num_groups} does not divide the batch of {self.batch_size} of {self.name}: "
                "choose a K that does, as some of the methods need equally many samples of each task"
            )
        intervals = TimestepIntervals.uniform(1000, num_groups)
        generator = torch.Generator().manual_seed(num_groups)
        t = intervals.sample_stratified(self.batch_size, generator)
        clean, noise = (torch.randn((self.batch_size, *self.sample_shape), generator=generator) for _ in range(2))
        y = torch.randint(NUM_CLASSES, (self.batch_size,), generator=generator)
        x = GaussianDiffusion(DiffusionConfig(variance="fixed_small")).q_sample(clean, t, noise)
        images = (tensor.to(device=device, dtype=dtype) for tensor in (x, noise))
        x, noise = images
        return Batch(x, t.to(device), y.to(device), noise, intervals.task_of(t).to(device), num_groups)

    def losses(self, network: Network, x: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the predicted noise per sample, (B,), at least in float32."""
        prediction = network(x, t, y)
        error = (prediction.float() if prediction.dtype == torch.bfloat16 else prediction) - noise
        return error.square().flatten(1).mean(1)


def dit(width: int, depth: int, batch_size: int, input_size: int) -> Workload:
    """Our class-conditional DiT on 4-channel latents in patches of 2 x 2."""
    config = DiTConfig(
        input_size=input_size,
        patch_size=2,
        in_channels=4,
        hidden_size=width,
        depth=depth,
        num_heads=max(1, width // 32),
        num_classes=NUM_CLASSES,
        learn_sigma=False,
    )
    return Workload("DiT", width, batch_size, (4, input_size, input_size), lambda: DiT(config))


def preset_dit(preset: str, batch_size: int) -> Workload:
    """A published size on 32 x 32 latents (256-pixel images)."""
    config = dit_config(preset, input_size=32, in_channels=4, num_classes=NUM_CLASSES, learn_sigma=False)
    return Workload(preset, config.hidden_size, batch_size, (4, 32, 32), lambda: DiT(config))


def unet(width: int, multipliers: tuple[int, ...], batch_size: int, input_size: int) -> Workload:
    """Our class-conditional U-Net (ADM's choices) on 4-channel latents.

    Small: one residual block per resolution, attention at all resolutions but the highest, 4 channels to a group of the
    norms at the highest (as in ADM with 128 channels).
    """
    config = UNetConfig(
        input_size=input_size,
        in_channels=4,
        channels=width,
        channel_mult=multipliers,
        num_res_blocks=1,
        attention_resolutions=tuple(input_size // 2**level for level in range(1, len(multipliers))),
        head_channels=32,
        norm_groups=width // 4,
        num_classes=NUM_CLASSES,
        learn_sigma=False,
    )
    return Workload("U-Net", width, batch_size, (4, input_size, input_size), lambda: UNet(config))


def default_workloads() -> list[Workload]:
    """DiT of two widths on 16 x 16 latents (128-pixel images), U-Net of two widths on 32 x 32 (pixels or latents)."""
    dits = [dit(width, depth=6, batch_size=64, input_size=16) for width in (128, 256)]
    return dits + [unet(width, (1, 2, 2), batch_size=32, input_size=32) for width in (32, 64)]


def quick_workloads() -> list[Workload]:
    """Toys of the same kinds, for tests."""
    return [dit(width=32, depth=2, batch_size=8, input_size=8), unet(16, (1, 2), batch_size=8, input_size=8)]


def find_workloads(names: list[str], size: Literal["default", "quick"], batch_size: int | None) -> list[Workload]:
    """The workloads to measure.

    Args:
        names: ``DiT``, ``DiT-128``, ``DiT-B/2``, ...; empty for all of this size.
        size: Which to choose from; the published presets are always there.
        batch_size: Instead of the workload's own.

    Raises:
        UserInputError: For an unknown name.
    """
    known = default_workloads() if size == "default" else quick_workloads()
    chosen: list[Workload] = []
    for name in names:
        matching = [workload for workload in known if name in (workload.model, workload.name)]
        if name in DIT_PRESETS:
            matching = [preset_dit(name, batch_size=64)]
        if not matching:
            options = ", ".join([*dict.fromkeys(w.model for w in known), *(w.name for w in known)])
            raise UserInputError(f"unknown model {name!r}: choose of {options}, or a published size such as DiT-B/2")
        chosen += matching
    chosen = list({workload.name: workload for workload in chosen or known}.values())
    if batch_size is None:
        return chosen
    return [dataclasses.replace(workload, batch_size=batch_size) for workload in chosen]
