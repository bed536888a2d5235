"""A small checkpoint, and calls of `dtr-lab probe`, that its tests share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from experiments import probe
from experiments.__main__ import main
from experiments.probing.data import Batches, find_data
from experiments.probing.subject import Subject, load_subject
from lightning_modules.run_record import RESUME_KEY
from lightning_modules.tracking.callback import CHECKPOINT_KEY

RUN_ID = "0123456789abcdef"


def save_checkpoint(module, path: Path, *, data: str | None = "digits", run_id: str | None = RUN_ID) -> Path:
    """Saves a denoiser as training does; its averaged weights differ from its trained ones."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.ema.module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    contents = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "global_step": 70}
    if data is not None:
        contents[RESUME_KEY] = {"data": data}
    if run_id is not None:
        contents[CHECKPOINT_KEY] = {"run_id": run_id, "attempt": 1, "step": 70}
    torch.save(contents, path)
    return path


def run_probe(checkpoint: Path, out: Path, *arguments: str, tracked: bool = False) -> int:
    """Calls the command line on small batches."""
    options = ["--batch-size=32", f"--out={out}", "--device=cpu", *([] if tracked else ["--no-tracking"])]
    return main(["probe", str(checkpoint), *options, *arguments])


def parse(checkpoint: Path, *arguments: str) -> argparse.Namespace:
    """The arguments as the command gets them."""
    parser = argparse.ArgumentParser()
    probe.add_arguments(parser)
    return parser.parse_args([str(checkpoint), "--batch-size=32", "--device=cpu", *arguments])


def prepare(checkpoint: Path, *arguments: str) -> tuple[argparse.Namespace, Subject, Batches]:
    """What a measurement starts from."""
    args = parse(checkpoint, *arguments)
    subject = load_subject(args, torch.device("cpu"))
    return args, subject, Batches(subject, find_data(args, subject), args.batch_size, args.seed)
