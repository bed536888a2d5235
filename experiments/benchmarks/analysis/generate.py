"""Telemetry of trainings that never took place, written by the real writer's code in shards of its sizes.

The numbers have the forms of real ones (losses that fall with steps, gradients that agree with their neighbours and
are noisy, channels of unequal energy) and as many random digits, so that they compress no better.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from experiments.benchmarks.analysis.workloads import Workload
from lightning_modules.tracking import records
from lightning_modules.tracking.shards import record_batch, shard_bytes

QUANTITIES = ("mse", "vb")
_DIMENSION = 24
"""Of the made-up gradients."""
_SIGNAL_SAMPLES = 20.0
"""Samples at which the noise of a made-up gradient equals its signal."""
_CLOCK_EVERY = 50
"""Steps between two readings of the training clock, as Lightning's ``log_every_n_steps``."""
_REPEATS, _TUNINGS, _UPDATES, _BATCHES, _TIMES = 16, 2, (10, 100), 4, 32
"""Of `dtr-lab affinity`: draws of its look-ahead and of its fine-tunings, updates of these, batches, timesteps."""
_FASTER = {"dtr": 1.2, "dtr-wide": 1.1}

FloatArray = npt.NDArray[np.float64]
Columns = dict[str, Any]


def write_telemetry(folder: Path, workload: Workload, method: str, seed: int) -> None:
    """Writes the telemetry folder of one training: manifest, masks and shards."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = workload.manifest(method, seed)
    (folder / Path(records.MANIFEST_PATH).name).write_text(manifest.to_json())
    if manifest.routing is not None:
        (folder / Path(records.MASKS_PATH).name).write_bytes(_masks(workload, manifest))
    rng = np.random.default_rng([seed, sum(method.encode())])
    sources = (
        (records.TIMESTEP_LOSS, _losses(workload, method, rng)),
        (records.GRADIENT_GRAMIAN, _gramians(workload, rng)),
        (records.CHANNEL_ACTIVATION, _activations(workload, rng)),
        (records.TRAINING_TIME, _clock(workload)),
    )
    if workload.affinity:
        _write_affinity(folder, workload, rng)
    number = 0
    for table, measured in sources:
        (folder / table).mkdir(exist_ok=True)
        for batches in _shards(table, measured, workload.shard_ends()):
            path = folder / table / f"a001-{number:06d}.parquet"
            path.write_bytes(shard_bytes(table, batches, attempt=1, resumed_from=0))
            number += 1


def _shards(table: str, measured: Iterable[tuple[int, Columns]], ends: Sequence[int]) -> Iterator[list[pa.RecordBatch]]:
    """The rows up to each of the steps at which the writer puts on disk what it has."""
    waiting: list[pa.RecordBatch] = []
    end = iter(ends)
    last = next(end)
    for step, columns in measured:
        if step > last:
            last = next(each for each in end if each >= step)
            if waiting:
                yield waiting
                waiting = []
        waiting.append(record_batch(table, columns))
    if waiting:
        yield waiting


def _losses(workload: Workload, method: str, rng: np.random.Generator) -> Iterator[tuple[int, Columns]]:
    """Windows of training, and validations."""
    level = (1 + 0.01 * rng.standard_normal()) * np.linspace(0.6, 0.03, workload.num_timesteps)
    windows, validations = (set(workload.times(every)) for every in (workload.window, workload.validate_every))
    for step in sorted(windows | validations):
        mean = level * (0.5 + np.exp(-_FASTER.get(method, 1.0) * step / (0.2 * workload.steps)))
        if step in windows:
            samples = workload.window * workload.batch_size
            yield step, _moments(rng, mean, samples, step, step - workload.window, "train")
        if step in validations:
            yield step, _moments(rng, mean, workload.validation_samples, step, step, "val")


def _moments(
    rng: np.random.Generator, mean: FloatArray, samples: int, step: int, window_start: int, split: str
) -> Columns:
    """Rows of `TIMESTEP_LOSS` for samples of both quantities at random timesteps."""
    count = rng.multinomial(samples, np.full(len(mean), 1 / len(mean)))
    timestep = count.nonzero()[0]
    count = count[timestep]
    rows: list[tuple[npt.NDArray, ...]] = []
    for scale in (1.0, 0.1):
        total = scale * mean[timestep] * (count + 0.3 * np.sqrt(count) * rng.standard_normal(len(count)))
        rows.append((timestep, count, total, 1.09 * total**2 / count))
    columns = dict(
        zip(("timestep", "count", "sum", "sum_sq"), map(np.concatenate, zip(*rows, strict=True)), strict=True)
    )
    quantity = [name for name in QUANTITIES for _ in timestep]
    return {"step": step, "window_start": window_start, "split": split, "quantity": quantity, **columns}


def _gramians(workload: Workload, rng: np.random.Generator) -> Iterator[tuple[int, Columns]]:
    layers, groups = workload.layer_names, workload.groups
    distance = np.subtract.outer(np.arange(workload.tasks), np.arange(workload.tasks))
    agreement = np.exp(-(distance**2) / 8) - 0.2 + 0.2 * np.eye(workload.tasks)
    values, vectors = np.linalg.eigh(agreement)
    directions = np.zeros((workload.tasks, _DIMENSION))
    directions[:, : workload.tasks] = vectors * np.sqrt(values.clip(0))
    signal = np.repeat(directions, workload.halves, axis=0)
    count = np.full(groups, workload.batch_size // groups)
    noise = np.sqrt(_SIGNAL_SAMPLES / count[0] / _DIMENSION)
    for step in workload.times(workload.probe_every):
        gradients = signal + noise * rng.standard_normal((len(layers), groups, _DIMENSION))
        gramian = gradients @ gradients.swapaxes(1, 2) * np.exp(-2 * step / workload.steps)
        yield (
            step,
            {
                "step": step,
                "layer": layers,
                "halves": workload.halves,
                "group_count": np.tile(count, (len(layers), 1)),
                "group_loss": np.tile(np.linspace(0.6, 0.03, groups), (len(layers), 1)),
                "gramian": gramian.astype(np.float32).reshape(len(layers), -1),
                "coverage": np.ones(len(layers)),
            },
        )


def _activations(workload: Workload, rng: np.random.Generator) -> Iterator[tuple[int, Columns]]:
    sites = ("input", "update")
    shape = (workload.blocks, len(sites), workload.tasks)
    block, site, task = (index.ravel() for index in np.indices(shape))
    loudness = rng.gamma(2.0, 0.5, (len(block), workload.channels)).astype(np.float32)
    for step in workload.times(workload.activation_every):
        spread = rng.standard_normal(loudness.shape, dtype=np.float32)
        energy = loudness * (1 + 0.1 * spread) ** 2
        yield (
            step,
            {
                "step": step,
                "block": [workload.block_names[index] for index in block],
                "site": [sites[index] for index in site],
                "task": task,
                "count": np.full(len(block), 256 * workload.batch_size // workload.tasks),
                "mean": 0.1 * np.sqrt(energy) * spread,
                "mean_square": energy,
                "active_fraction": 1 - np.exp(-energy),
            },
        )


def _clock(workload: Workload) -> Iterator[tuple[int, Columns]]:
    for step in workload.times(_CLOCK_EVERY):
        yield step, {"step": [step], "seconds": [step * workload.seconds_per_step]}


def _write_affinity(folder: Path, workload: Workload, rng: np.random.Generator) -> None:
    """What `dtr-lab affinity` adds for the last checkpoint: a file for each measure."""
    pieces = {
        (records.TASK_TRANSFER, records.LOOK_AHEAD): [_transfer(workload, rng, 1, each) for each in range(_REPEATS)],
        (records.TASK_TRANSFER, records.FINE_TUNING): [
            _transfer(workload, rng, updates, each) for updates in _UPDATES for each in range(_TUNINGS)
        ],
        (records.REPRESENTATION, records.REPRESENTATION): [_hsic(workload, rng, batch) for batch in range(_BATCHES)],
    }
    for (table, measure), rows in pieces.items():
        (folder / table).mkdir(exist_ok=True)
        content = shard_bytes(table, [record_batch(table, each) for each in rows], attempt=1, resumed_from=None)
        (folder / table / f"{measure}-step-{workload.steps:08d}.parquet").write_bytes(content)


def _transfer(workload: Workload, rng: np.random.Generator, updates: int, repeat: int) -> Columns:
    """One draw of a look-ahead (one update) or a fine-tuning (more of them), in which neighbours help each other."""
    tasks, samples = workload.tasks, 64
    distance = np.abs(np.subtract.outer(np.arange(tasks), np.arange(tasks)))
    loss = np.linspace(0.6, 0.03, tasks)
    saved = 0.01 * np.exp(-distance / 2) - (0.02 * distance if updates > 1 else 0.0)
    change = -loss * (saved + 0.001 * rng.standard_normal((tasks, tasks)))
    return {
        "step": workload.steps,
        "measure": records.LOOK_AHEAD if updates == 1 else records.FINE_TUNING,
        "optimizer": "sgd" if updates == 1 else "adamw",
        "learning_rate": np.full(tasks, 1e-4),
        "repeat": repeat,
        "updates": updates,
        "source": np.arange(tasks),
        "count": np.full((tasks, tasks), samples),
        "before": np.tile(samples * loss, (tasks, 1)),
        "change": samples * change,
        "change_sq": 2 * samples * change**2,
        "predicted": 1.05 * change if updates == 1 else np.full((tasks, tasks), np.nan),
    }


def _hsic(workload: Workload, rng: np.random.Generator, batch: int) -> Columns:
    times = np.linspace(0, workload.num_timesteps - 1, min(_TIMES, workload.num_timesteps)).astype(int)
    near = np.exp(-np.abs(np.subtract.outer(times, times)) / (0.4 * workload.num_timesteps))
    values = near * (1 + 0.01 * rng.standard_normal((workload.blocks, *near.shape)))
    return {
        "step": workload.steps,
        "block": workload.block_names,
        "batch": batch,
        "count": 128,
        "timesteps": np.tile(times, (workload.blocks, 1)),
        "hsic": values.reshape(workload.blocks, -1),
    }


def _masks(workload: Workload, manifest: records.RunManifest) -> bytes:
    from lightning_modules.routing import MaskConfig, channel_masks  # takes torch, for seconds

    assert manifest.routing is not None
    config = MaskConfig(
        kind="random" if manifest.method == "random" else "dtr",
        beta=float(manifest.routing["beta"]),
        seed=manifest.seed,
    )
    mask = channel_masks(config, workload.num_timesteps, workload.channels)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict.fromkeys(workload.block_names, mask))  # type: ignore[arg-type]
    return buffer.getvalue()
