"""``dtr-lab probe``: gradient conflict of a checkpoint, measured offline as precisely as one likes."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.errors import UserInputError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from experiments.probing.data import ProbeData
    from experiments.probing.subject import Subject


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint written by `dtr-lab train`, or a published DiT (official keys)"
    )
    _add_tasks(parser.add_argument_group("what to measure"))
    _add_budget(parser.add_argument_group("how long"))
    _add_data(parser.add_argument_group("on which data"))
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, help="folder for files (default: runs/probes/ and the run or file)")
    output.add_argument("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db here)")
    output.add_argument("--experiment", default="probe", help="MLflow experiment (default: %(default)s)")
    output.add_argument("--no-tracking", action="store_true", help="write the files only, log nothing to MLflow")


def _add_tasks(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--intervals", type=int, metavar="K", help="timestep intervals (default: the checkpoint's)")
    group.add_argument("--spacing", choices=["uniform", "log_snr"], help="of the intervals (default: uniform)")
    group.add_argument("--bounds", type=int, nargs="+", metavar="T", help="explicit bounds of the intervals, 0 to T")
    group.add_argument("--halves", type=int, default=2, help="independent parts of each task (default: %(default)s)")
    group.add_argument(
        "--timesteps",
        type=int,
        metavar="N",
        help="measure N single timesteps instead, by random projection in bounded memory: the N x N affinity",
    )
    group.add_argument("--samples", type=int, default=1, help="of a timestep in a batch (default: %(default)s)")
    group.add_argument(
        "--sketch-size",
        type=int,
        default=8192,
        metavar="D",
        help="numbers kept of a gradient; cosines err by about 1 / sqrt(D) (default: %(default)s)",
    )
    group.add_argument(
        "--check-exact", action="store_true", help="compare the sketches with exact gradients (small models)"
    )
    group.add_argument("--raw-weights", action="store_true", help="use the trained weights, not their average")
    group.add_argument("--num-heads", type=int, help="attention heads of a published DiT of unknown size")
    group.add_argument(
        "--loss-weight", choices=["uniform", "min_snr", "p2", "speed"], help="(default: as the checkpoint was trained)"
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="also compare one batch with a backward pass for each group; exit code 1 if they differ",
    )


def _add_budget(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batches",
        type=int,
        metavar="N",
        help="at most so many (default: 64; with --timesteps, 8 passes over them)",
    )
    group.add_argument("--batch-size", type=int, default=128, help="samples of a batch (default: %(default)s)")
    group.add_argument(
        "--precision",
        type=float,
        metavar="E",
        help="stop as soon as at least half of the noise-corrected cosines are defined, each with a standard error of "
        "at most E (with --timesteps: their root mean square)",
    )
    group.add_argument("--minutes", type=float, help="stop after the batch in which so many minutes have passed")
    group.add_argument("--seed", type=int, default=0, help="of images, noise and timesteps (default: %(default)s)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        choices=["digits", "image_folder", "latents"],
        help="default: the training images of the checkpoint's run, as far as it tells",
    )
    group.add_argument(
        "--data-path",
        type=Path,
        metavar="PATH",
        help="the folder of images, or the file of latents: .npz or .pt with the keys x (N, C, H, W) and, optionally, "
        "y (N,), the labels; or .npy with x alone",
    )
    group.add_argument(
        "--latent-scale",
        type=float,
        default=1.0,
        help="multiplies the latents; 0.18215 for raw ones of Stable Diffusion's autoencoder (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Measures, and prints the result and where the files are."""
    import os

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from rich.console import Console

    from experiments.probing.data import find_data
    from experiments.probing.intervals import build_intervals
    from experiments.probing.modes import Setup, check_timesteps_budget, probe_intervals, probe_timesteps
    from experiments.probing.record import ProbeRecord, output_folder, tracking_logger
    from experiments.probing.subject import load_subject
    from experiments.probing.timesteps import choose_timesteps, projection_of

    _check(args)
    device, logger, console = chosen_device(args.device), tracking_logger(args), Console()
    subject = load_subject(args, device)
    measure: Callable[[Setup], int]
    if args.timesteps is None:
        measure = functools.partial(probe_intervals, intervals=build_intervals(args, subject))
    else:
        timesteps = choose_timesteps(args, subject)
        check_timesteps_budget(args)
        measure = functools.partial(probe_timesteps, timesteps=timesteps, projection=projection_of(args, subject))
    data = find_data(args, subject)
    folder = output_folder(args, subject)
    _announce(args, subject, data, console)
    record = ProbeRecord(folder, logger)
    try:
        code = measure(Setup(args, subject, data, record, console))
    except BaseException as error:
        record.abandon("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    console.print(f"Files: {folder}", soft_wrap=True, markup=False, highlight=False)
    return code


def _check(args: argparse.Namespace) -> None:
    """Refuses numbers that mean nothing, before anything is loaded.

    Raises:
        UserInputError: Naming the option.
    """
    for name in ("batches", "batch_size", "intervals", "sketch_size", "samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserInputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("precision", "minutes", "latent_scale"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserInputError(f"--{name.replace('_', '-')} must be a positive number, got {value}")
    if args.halves < 2:
        raise UserInputError(f"--halves must be at least 2, got {args.halves}: noise cannot be corrected for with one")
    if args.seed < 0:
        raise UserInputError(f"--seed must not be negative, got {args.seed}")
    if args.check_exact and args.timesteps is None:
        raise UserInputError("--check-exact belongs to --timesteps")
    if args.samples != 1 and args.timesteps is None:
        raise UserInputError("--samples belongs to --timesteps; of intervals, --batch-size says how many samples")
    if args.verify and args.timesteps is not None:
        raise UserInputError("--verify checks intervals; with --timesteps use --check-exact")


def chosen_device(name: str | None) -> torch.device:
    """The device of an option ``--device``: CUDA if there is one and none is named.

    Raises:
        UserInputError: If there is no such device.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        raise UserInputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def _announce(args: argparse.Namespace, subject: Subject, data: ProbeData, console: Console) -> None:
    """Says what is about to be measured, and what about it deserves a doubt."""
    count = sum(p.numel() for p in subject.backbone.parameters() if p.requires_grad)
    trained = "" if subject.step is None else f", step {subject.step:,}"
    console.print(
        f"{subject.path}: {subject.weights} weights of a {type(subject.backbone).__name__} with {count:,} parameters"
        f"{trained}; data {data.name}, {len(data):,} samples; loss weight {subject.module.loss_weight.name}.",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    if args.data == "latents":
        x = data.fetch(list(range(min(len(data), 256))))[0]
        console.print(f"Latents have the standard deviation {float(x.std()):.2f} after scaling.", highlight=False)
    if args.loss_weight is None and subject.weights.startswith("published"):
        console.print("A published file does not say how the loss was weighted: uniform is assumed.", highlight=False)
