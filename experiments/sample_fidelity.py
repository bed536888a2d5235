"""How close the samples of finished runs are to real images, in pixels: ``python -m experiments.sample_fidelity``.

Logs the MLflow metrics ``fidelity/{frechet,kernel}_pixels`` (distances), ``fidelity/{precision,recall}_pixels`` and
``fidelity/frechet_pixels_bias`` (about what perfect samples of that number would give) to each run. These are measures
of pixels, not of Inception features: they rank models on small images, and are not comparable with published FIDs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from torch import Tensor

    from experiments.probing.data import ProbeData
    from experiments.probing.subject import Subject

TAG_FIDELITY = "dtr.fidelity"
"""How a run's samples were drawn; they are drawn again where that differs from what is asked for."""
METRICS = tuple(f"fidelity/{name}_pixels" for name in ("frechet", "kernel", "precision", "recall"))
BIAS = f"{METRICS[0]}_bias"
SAMPLES = 1000
_STEPS, _SEED = 50, 0
_AT_ONCE = 250
_MOST_REAL = 10_000
"""Real images that samples are compared with, at most; a fixed choice of them."""
_MOST_PIXELS = 4096
"""Numbers in an image: beyond, distances between pixels say nothing and covariances do not fit."""
_LABEL_STREAM, _NOISE_STREAM, _REAL_STREAM = 20, 21, 22


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """What was measured of one run's samples.

    Attributes:
        metrics: MLflow metric -> value. Of samples that are not finite numbers, distances are infinite and the
            shares 0.
        step: Of the checkpoint.
        drawn: The value of `TAG_FIDELITY`.
    """

    metrics: dict[str, float]
    step: int
    drawn: str


def sample_fidelity(
    checkpoint: Path, *, samples: int = SAMPLES, tracking_uri: str | None = None, threads: int | None = None
) -> Fidelity:
    """Draws samples from a checkpoint and compares them with all images of its data set, held-out ones included.

    The averaged weights, 50 steps of DDIM, no guidance; labels and noise are the same for every checkpoint. Labels are
    drawn from the real ones, so that the shares of classes are right.

    Args:
        checkpoint: Of `dtr-lab train`.
        samples: How many, N.
        tracking_uri: The store of its run, which says what it was trained on.
        threads: That torch may use; as many as it likes by default.

    Raises:
        UserInputError: If the checkpoint or its data cannot be read, or images are too large for such measures.
    """
    import torch

    from experiments.probing.data import find_data
    from experiments.probing.subject import load_subject

    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = argparse.Namespace(checkpoint=checkpoint, raw_weights=False, num_heads=None, loss_weight=None)
    subject = load_subject(named, device)
    asked = argparse.Namespace(data=None, data_path=None, latent_scale=1.0, tracking_uri=tracking_uri, batch_size=1)
    real, labels = _real_images(find_data(asked, subject))
    drawn = _draw(subject, labels, samples)
    metrics = _measured(drawn.double().flatten(1), real.double().flatten(1))
    return Fidelity(metrics, subject.step or 0, drawn_as(samples, len(real)))


def drawn_as(samples: int, real: int) -> str:
    """The value of `TAG_FIDELITY`: in words, for a report."""
    return f"{samples} samples, {_STEPS} DDIM steps, seed {_SEED}, against {real} real images"


def measure_comparison(
    uri: str, *, experiment: str, comparison: str, run_dir: Path, samples: int = SAMPLES, workers: int = 2
) -> list[str]:
    """Measures all finished runs of a comparison that were not measured yet, and logs what it finds to them.

    Args:
        uri: MLflow store.
        experiment: Name of the MLflow experiment.
        comparison: Id of the comparison.
        run_dir: Where checkpoints lie, ``<run_dir>/<run id>/checkpoints/last.ckpt``.
        samples: How many from each.
        workers: Processes side by side.

    Returns:
        What went wrong, a sentence for each run that could not be measured.

    Raises:
        UserInputError: If there are no such runs, or an option makes no sense.
    """
    from lightning_modules.tracking.store import check_store, mlflow_client

    if samples < 2 or workers < 1:
        raise UserInputError("--samples must be at least 2, and --workers at least 1")
    check_store(uri)
    client = mlflow_client(uri)
    waiting, problems = [], []
    for run_id, name, measured in _finished_runs(client, experiment, comparison):
        checkpoint = run_dir / run_id / "checkpoints" / "last.ckpt"
        if measured.startswith(f"{samples} samples, "):
            continue
        if checkpoint.is_file():
            waiting.append((run_id, name, checkpoint))
        else:
            problems.append(f"{name}: no checkpoint at {checkpoint}; --run-dir says where they lie")
    print(f"{len(waiting)} runs to measure, {samples} samples each.", flush=True)
    begin = time.perf_counter()
    for run_id, name, outcome in _outcomes(waiting, samples, uri, workers):
        if isinstance(outcome, Fidelity):
            _log(client, run_id, outcome)
            print(f"{name}: {_readable(outcome)} ({time.perf_counter() - begin:.0f} s)", flush=True)
        else:
            problems.append(f"{name}: {outcome}")
    return problems


def _finished_runs(client: MlflowClient, experiment: str, comparison: str) -> list[tuple[str, str, str]]:
    """Id, name and `TAG_FIDELITY` (empty if not all was measured) of each finished training of a comparison."""
    from analysis.reading.store import logged_runs

    known = client.get_experiment_by_name(experiment)
    if known is None:
        raise UserInputError(f"no experiment {experiment!r} in this store: --experiment names one")
    runs = logged_runs(client, known.experiment_id, kind=records.KIND_TRAINING)
    own = [run for run in runs if run.data.tags.get(records.TAG_COMPARISON) == comparison]
    if not own:
        others = ", ".join(sorted({run.data.tags.get(records.TAG_COMPARISON, "") for run in runs} - {""}))
        raise UserInputError(f"no training runs of a comparison {comparison!r}; there are: {others or 'none'}")
    found = []
    for run in own:
        if run.info.status == "FINISHED":
            complete = all(metric in run.data.metrics for metric in METRICS)
            tag = run.data.tags.get(TAG_FIDELITY, "") if complete else ""
            found.append((run.info.run_id, str(run.info.run_name), tag))
    return found


def _outcomes(
    waiting: Sequence[tuple[str, str, Path]], samples: int, uri: str, workers: int
) -> Iterator[tuple[str, str, Fidelity | str]]:
    """Run id, name, and what was measured or why not, as each is done."""
    workers = min(workers, len(waiting))
    if workers < 2:
        for run_id, name, path in waiting:
            yield run_id, name, _outcome(path, samples, uri)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Not forked: torch's threads do not survive that.
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(_outcome, path, samples, uri, threads): (run_id, name) for run_id, name, path in waiting}
        for job in concurrent.futures.as_completed(jobs):
            yield *jobs[job], job.result()


def _outcome(checkpoint: Path, samples: int, uri: str, threads: int | None = None) -> Fidelity | str:
    try:
        return sample_fidelity(checkpoint, samples=samples, tracking_uri=uri, threads=threads)
    except UserInputError as error:
        return str(error)
    except Exception as error:  # hours of training are behind this: one checkpoint must not cost the results of all
        return f"{type(error).__name__}: {error}"


def _real_images(data: ProbeData) -> tuple[Tensor, Tensor]:
    """Images (M, C, H, W) and labels (M,), training and held-out ones."""
    import torch
    from torch.utils.data import ConcatDataset

    from experiments.probing.data import ProbeData
    from lightning_modules.seeding import seeded_generator

    every = data if data.held_out is None else ProbeData(data.name, ConcatDataset([data.dataset, data.held_out]))
    order = torch.randperm(len(every), generator=seeded_generator(_SEED, _REAL_STREAM))[:_MOST_REAL]
    images, labels = every.fetch(order.tolist())
    if images[0].numel() > _MOST_PIXELS:
        raise UserInputError(
            f"images of {data.name} have {images[0].numel()} numbers: measures of pixels are for small images, of "
            f"{_MOST_PIXELS} at most"
        )
    return images, torch.as_tensor(labels)


def _draw(subject: Subject, labels: Tensor, count: int) -> Tensor:
    """Samples (N, C, H, W), on the CPU."""
    import torch

    from lightning_modules.sampling import sample
    from lightning_modules.seeding import seeded_generator

    config = subject.backbone.config
    order = torch.randint(len(labels), (count,), generator=seeded_generator(_SEED, _LABEL_STREAM))
    chosen = labels[order].to(subject.module.device) if config.num_classes else None
    generator = seeded_generator(_SEED, _NOISE_STREAM)  # on the CPU, so that devices agree
    pieces = []
    for start in range(0, count, _AT_ONCE):
        size = min(_AT_ONCE, count - start)
        pieces.append(
            sample(
                subject.backbone,
                subject.module.diffusion,
                (size, config.in_channels, config.input_size, config.input_size),
                y=None if chosen is None else chosen[start : start + size],
                steps=min(_STEPS, subject.module.diffusion.num_timesteps),
                method="ddim",
                clip_sample=True,
                generator=generator,
            ).cpu()
        )
    return torch.cat(pieces)


def _measured(drawn: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    from analysis.fidelity import frechet_bias, frechet_distance, kernel_distance, precision_recall

    fake, true = drawn.numpy(), real.numpy()
    bias = frechet_bias(true, len(fake))
    if not drawn.isfinite().all():
        return {**dict(zip(METRICS, (float("inf"), float("inf"), 0.0, 0.0), strict=True)), BIAS: bias}
    values = frechet_distance(fake, true), kernel_distance(fake, true), *precision_recall(fake, true)
    return {**dict(zip(METRICS, values, strict=True)), BIAS: bias}


def _log(client: MlflowClient, run_id: str, found: Fidelity) -> None:
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    metrics = [Metric(key, value, now, found.step) for key, value in found.metrics.items()]
    client.log_batch(run_id, metrics=metrics, tags=[RunTag(TAG_FIDELITY, found.drawn)])


def _readable(found: Fidelity) -> str:
    return ", ".join(f"{key.removeprefix('fidelity/')} {value:.4g}" for key, value in found.metrics.items())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 1 if a run could not be measured, 2 for a user's mistake."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from lightning_modules.tracking.store import resolve_tracking_uri

    parser = argparse.ArgumentParser(prog="python -m experiments.sample_fidelity", description=__doc__)
    parser.add_argument("--experiment", required=True, help="name of the MLflow experiment")
    parser.add_argument("--comparison", required=True, help="id of the comparison whose runs are measured")
    parser.add_argument("--tracking-uri", help="MLflow store (default: $MLFLOW_TRACKING_URI or sqlite:///mlflow.db)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="checkpoints (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each run (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        problems = measure_comparison(
            resolve_tracking_uri(args.tracking_uri),
            experiment=args.experiment,
            comparison=args.comparison,
            run_dir=args.run_dir,
            samples=args.samples,
            workers=args.workers,
        )
    except UserInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
