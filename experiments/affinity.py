"""``dtr-lab affinity``: what training on one timestep interval does to the others, measured at checkpoints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lightning_modules.errors import UserInputError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from experiments.probing.subject import Subject
    from lightning_modules.timesteps import TimestepIntervals

T = TypeVar("T")
_MEASURES = ("look_ahead", "fine_tuning", "representation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="CHECKPOINT",
        help="written by `dtr-lab train` (several of one run make a film), or a published DiT",
    )
    parser.add_argument(
        "--measures",
        nargs="+",
        choices=_MEASURES,
        default=list(_MEASURES),
        help="look_ahead: a step on each task, and back (TAG); fine_tuning: many steps on each (Min-SNR, figure 2); "
        "representation: CKA between timesteps, by block (default: all)",
    )
    _add_transfer(parser.add_argument_group("look-ahead and fine-tuning"))
    _add_representation(parser.add_argument_group("representation"))
    _add_subject(parser.add_argument_group("which network, which data"))
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("runs/affinity"), help="folder (default: %(default)s)")
    output.add_argument("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db here)")
    output.add_argument("--experiment", default="affinity", help="of published files (default: %(default)s)")
    output.add_argument("--no-tracking", action="store_true", help="write the files only, log nothing to MLflow")
    output.add_argument(
        "--progress", choices=["bar", "lines"], default="bar", help="lines: JSON, for programs (default: %(default)s)"
    )


def _add_transfer(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--repeats", type=int, default=16, metavar="N", help="of the look-ahead, with new samples (default: 16)"
    )
    group.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd", help="of the look-ahead (default: sgd)")
    group.add_argument("--learning-rate", type=float, metavar="RATE", help="(default: the checkpoint's)")
    group.add_argument(
        "--updates",
        type=int,
        nargs="+",
        default=[10, 100],
        metavar="N",
        help="evaluate fine-tuning after so many AdamW updates (default: 10 100)",
    )
    group.add_argument(
        "--fine-tuning-repeats", type=int, default=2, metavar="N", help="with new samples (default: %(default)s)"
    )
    group.add_argument(
        "--evaluation-samples", type=int, default=512, metavar="N", help="of fine-tuning (default: %(default)s)"
    )


def _add_representation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--images", type=int, default=512, metavar="N", help="images (default: %(default)s)")
    group.add_argument(
        "--timesteps", type=int, default=32, metavar="M", help="about so many, spread evenly (default: %(default)s)"
    )
    group.add_argument(
        "--features",
        choices=["flat", "pooled"],
        default="flat",
        help="of an image: all its tokens, or their mean (default: %(default)s)",
    )
    group.add_argument(
        "--noise",
        choices=["shared", "independent"],
        default="shared",
        help="whether an image gets the same noise at all timesteps (default: %(default)s)",
    )


def _add_subject(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--averaged-weights", action="store_true", help="the average of the weights, not what training goes on from"
    )
    group.add_argument("--intervals", type=int, metavar="K", help="of published files (default: 8)")
    group.add_argument("--num-heads", type=int, help="attention heads of a published DiT of unknown size")
    group.add_argument(
        "--loss-weight", choices=["uniform", "min_snr", "p2", "speed"], help="(default: as the checkpoint was trained)"
    )
    group.add_argument("--batch-size", type=int, default=128, help="samples of a batch (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of images, noise and timesteps (default: %(default)s)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    group.add_argument(
        "--data",
        choices=["digits", "image_folder", "latents"],
        help="default: the images of the checkpoint's run, as far as it tells",
    )
    group.add_argument("--data-path", type=Path, metavar="PATH", help="see `dtr-lab probe --help`")
    group.add_argument("--latent-scale", type=float, default=1.0, help="multiplies the latents (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measures one checkpoint after the other, and prints what was found and where the files are."""
    import os

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from rich.console import Console

    from experiments.probe import chosen_device

    _check(args)
    device, console = chosen_device(args.device), Console()
    for checkpoint in args.checkpoints:
        _measure(checkpoint, args, device, console)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses numbers that mean nothing, before anything is loaded.

    Raises:
        UserInputError: Naming the option.
    """
    from lightning_modules.representation import MIN_IMAGES

    least = dict.fromkeys(
        ("repeats", "fine_tuning_repeats", "evaluation_samples", "timesteps", "intervals", "num_heads"), 1
    )
    least |= {"images": MIN_IMAGES, "batch_size": MIN_IMAGES, "seed": 0}
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise UserInputError(f"--{name.replace('_', '-')} must be at least {lowest}, got {value}")
    if min(args.updates) < 1:
        raise UserInputError(f"--updates must be at least 1, got {min(args.updates)}")
    for name in ("learning_rate", "latent_scale"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserInputError(f"--{name.replace('_', '-')} must be a positive number, got {value}")
    missing = [str(path) for path in args.checkpoints if not path.is_file()]
    if missing:
        raise UserInputError(f"no checkpoint at {', '.join(missing)}")


def _measure(checkpoint: Path, args: argparse.Namespace, device: torch.device, console: Console) -> None:
    from experiments.measuring.draws import Draws
    from experiments.measuring.measures import measure_rows, work_of
    from experiments.measuring.record import AffinityRecord
    from experiments.measuring.results import report

    subject = _load(checkpoint, args, device)
    intervals = _intervals(args, subject)
    draws = Draws.of(args, subject, intervals)
    record = AffinityRecord(args, subject, draws.data, intervals)
    trained = "" if subject.step is None else f", step {subject.step:,}"
    seen = "held-out images" if draws.held_out else "a fifth of the images, kept apart here (training may know them)"
    console.print(
        f"{checkpoint}: {subject.weights} weights{trained}, {intervals.num_intervals} intervals; data "
        f"{draws.data.name}, evaluated on {seen}.",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    measures = [measure for measure in _MEASURES if measure in args.measures]
    work = {measure: work_of(measure, args, intervals.num_intervals) for measure in measures}
    with _Progress(args.progress, sum(work.values())) as progress:
        for measure in measures:
            progress.describe(measure)
            record.log_measure(measure, list(progress.count(measure_rows(measure, args, draws, record.step))))
    report(record, measures, console)


class _Progress:
    """A bar on standard error, or JSON lines on standard output as `experiments.trainings` reads them."""

    def __init__(self, style: str, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, dynamic_ncols=True, disable=style == "lines")
        self._lines = style == "lines"
        self._done, self._total = 0, total

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def describe(self, measure: str) -> None:
        self._bar.set_description(measure.replace("_", " "))

    def count(self, pieces: Iterable[T]) -> Iterator[T]:
        for piece in pieces:
            yield piece
            self._done += 1
            self._bar.update(1)
            if self._lines:
                state = {"step": self._done, "max_steps": self._total, "loss": None}
                print(json.dumps(state), flush=True)


def _intervals(args: argparse.Namespace, subject: Subject) -> TimestepIntervals:
    """The tasks: those of the checkpoint's run, whose other measurements they must fit; of published files, any."""
    from lightning_modules.timesteps import TimestepIntervals

    if args.intervals is None:
        return subject.module.intervals
    if subject.run_id is not None and args.intervals != subject.module.intervals.num_intervals:
        raise UserInputError(
            f"--intervals {args.intervals}: {subject.path} was trained and measured with "
            f"{subject.module.intervals.num_intervals} intervals, to which its affinities must belong; the option is "
            "for published files"
        )
    return TimestepIntervals.uniform(subject.module.intervals.num_timesteps, args.intervals)


def _load(checkpoint: Path, args: argparse.Namespace, device: torch.device) -> Subject:
    from experiments.probing.subject import load_subject
    from lightning_modules.published import read_weights_file

    ours = "hyper_parameters" in read_weights_file(checkpoint)
    return load_subject(
        argparse.Namespace(
            checkpoint=checkpoint,
            raw_weights=ours and not args.averaged_weights,
            num_heads=args.num_heads,
            loss_weight=args.loss_weight,
        ),
        device,
    )
