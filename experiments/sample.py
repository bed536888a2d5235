"""``dtr-lab sample``: images from a checkpoint, as one picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.errors import UserInputError
from lightning_modules.folders import writable_folder

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_modules.denoiser import DenoiserModule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint written by `dtr-lab train`")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/samples.png"), help="picture to write (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=40, help="number of images (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=10, help="images in a row (default: %(default)s)")
    parser.add_argument("--labels", type=int, nargs="+", help="classes, repeated in turn (default: all, in order)")
    parser.add_argument("--method", choices=["ddim", "ddpm"], default="ddim", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1 is no guidance (default: %(default)s)")
    parser.add_argument(
        "--guidance-channels", type=int, help="guide the first channels only: 3 as DiT does (default: all, as DTR)"
    )
    parser.add_argument("--raw-weights", action="store_true", help="use the trained weights, not their average")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Draws the samples and writes the picture."""
    import torch
    from PIL import Image

    from lightning_modules.checkpoint import load_denoiser
    from lightning_modules.sample_grid import image_grid
    from lightning_modules.sampling import sample
    from lightning_modules.seeding import seeded_generator

    if args.count < 1 or args.columns < 1:
        raise UserInputError("--count and --columns must be at least 1")
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserInputError(f"--out {args.out}: name a .png, .jpg or .webp file")
    module = load_denoiser(args.checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    config = module.backbone.config
    if args.guidance_scale != 1 and not config.has_null_class:
        raise UserInputError("--guidance-scale: this model was trained without label dropout, so it cannot be guided")
    writable_folder(args.out.parent, "--out")
    images = sample(
        module.backbone if args.raw_weights else module.ema.module,
        module.diffusion,
        (args.count, config.in_channels, config.input_size, config.input_size),
        y=_labels(args, module),
        guidance_scale=args.guidance_scale,
        guidance_channels=args.guidance_channels,
        steps=args.steps,
        method=args.method,
        generator=seeded_generator(args.seed, device=module.device),
        clip_sample=True,
        progress=True,
    )
    Image.fromarray(image_grid(images, min(args.columns, args.count))).save(args.out)
    print(f"{args.count} samples: {args.out}")
    return 0


def _labels(args: argparse.Namespace, module: DenoiserModule) -> Tensor | None:
    """Labels (count,), or None for an unconditional model."""
    import torch

    classes = module.backbone.config.num_classes
    if classes == 0:
        if args.labels:
            raise UserInputError("--labels: this model is unconditional")
        return None
    labels = args.labels or list(range(classes))
    if not all(0 <= label < classes for label in labels):
        raise UserInputError(f"--labels must lie in 0..{classes - 1}, got {labels}")
    return torch.tensor([labels[i % len(labels)] for i in range(args.count)], device=module.device)
