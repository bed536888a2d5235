"""Callback: a grid of samples from the averaged weights, logged while training goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.denoiser import DenoiserModule
from lightning_modules.errors import UserInputError
from lightning_modules.schedule import completes_step
from lightning_modules.seeding import seeded_generator
from lightning_modules.tracking.callback import writer_of


class SampleGrid(pl.Callback):
    """Logs image ``samples``: rows of labels 0, 1, 2, … from the same noise each time, so that steps can be compared.

    Args:
        every_n_steps: Steps between two grids; 0 turns the callback off.
        rows: Rows of the grid.
        columns: Images in a row; for class-conditional models column j shows label j mod the number of classes.
        sampling_steps: Denoising steps.
        method: ``"ddim"`` or ``"ddpm"``.
        guidance_scale: Classifier-free guidance; 1 is none.
        seed: Seed of the noise.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        rows: int = 4,
        columns: int = 10,
        sampling_steps: int = 50,
        method: str = "ddim",
        guidance_scale: float = 1.5,
        seed: int = 0,
    ) -> None:
        if every_n_steps < 0 or min(rows, columns, sampling_steps) < 1:
            raise UserInputError(
                "samples: every_n_steps must not be negative; rows, columns, sampling_steps at least 1"
            )
        if method not in ("ddim", "ddpm"):
            raise UserInputError(f"samples.method must be 'ddim' or 'ddpm', got {method!r}")
        self.every_n_steps = every_n_steps
        self.rows = rows
        self.columns = columns
        self.sampling_steps = sampling_steps
        self.method = method
        self.guidance_scale = guidance_scale
        self.seed = seed

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DenoiserModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Samples when the schedule names the step just completed."""
        if self.every_n_steps and completes_step(trainer, batch_idx) and trainer.global_step % self.every_n_steps == 0:
            writer = writer_of(trainer)
            if writer is not None:
                writer.log_image("samples", image_grid(self.draw(pl_module), self.columns), trainer.global_step)

    @torch.no_grad()
    def draw(self, module: DenoiserModule) -> Tensor:
        """The samples, (rows * columns, C, H, W)."""
        from lightning_modules.sampling import sample  # imports diffusers, which takes longer than most checks

        config = module.backbone.config
        count = self.rows * self.columns
        labels = None
        if config.num_classes > 0:
            labels = torch.arange(count, device=module.device) % self.columns % config.num_classes
        guided = labels is not None and config.label_dropout > 0
        return sample(
            module.ema.module,
            module.diffusion,
            (count, config.in_channels, config.input_size, config.input_size),
            y=labels,
            guidance_scale=self.guidance_scale if guided else 1.0,
            steps=self.sampling_steps,
            method=self.method,  # type: ignore[arg-type]
            generator=seeded_generator(self.seed, device=module.device),
            clip_sample=True,
        )


def image_grid(images: Tensor, columns: int, min_height: int = 256) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] as one picture, uint8 (height, width, 3), enlarged to legible pixels.

    Grey and colour images only: of more than 3 channels the first 3 are shown.
    """
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    pixels = np.repeat(pixels, 3, axis=1) if pixels.shape[1] == 1 else pixels[:, :3]
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = np.full((rows * columns, channels, height + 1, width + 1), 255, dtype=np.uint8)
    canvas[:count, :, :height, :width] = pixels
    canvas = canvas.reshape(rows, columns, channels, height + 1, width + 1)
    picture = canvas.transpose(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), channels)
    factor = max(1, -(-min_height // picture.shape[0]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
