"""Synthetic runs with known truth, written into an MLflow store as the tracking code lays them out.

The truth: tasks form two groups. Within a group the true gradients have cosine `WITHIN`, between groups `BETWEEN`, in
every layer; samples add isotropic noise. Losses fall exponentially, DTR's `DTR_SPEED` times as fast as the baseline's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mlflow import MlflowClient

from lightning_modules.tracking import records
from lightning_modules.tracking.records import RunManifest

T, K, HALVES = 200, 8, 2
WITHIN, BETWEEN = 0.8, -0.4
DTR_SPEED = 1.5
TAU = {"baseline": 300.0, "random": 320.0, "dtr": 300.0 / DTR_SPEED}
STEPS = np.arange(100, 1001, 100)
CHANNELS = {"blocks.0": 32, "blocks.1": 32}
BETA = 0.75
LAYERS = ("x_embedder.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "final_layer.linear")
EXPERIMENT = "digits-demo"
COMPARISON = "c-one"


def true_cosine() -> np.ndarray:
    """(K, K) cosine of the true task gradients."""
    group = np.arange(K) * 2 // K
    cosine = np.where(group[:, None] == group[None, :], WITHIN, BETWEEN)
    np.fill_diagonal(cosine, 1.0)
    return cosine


def manifest(method: str = "baseline", seed: int = 0) -> RunManifest:
    routing = {"alpha": 4.0, "beta": BETA, "variant": "paper", "seed": seed, "per_block": False}
    return RunManifest(
        method=method,
        seed=seed,
        num_timesteps=T,
        interval_bounds=list(range(0, T + 1, T // K)),
        interval_spacing="uniform",
        log_snr=np.linspace(8, -8, T).tolist(),
        target="epsilon",
        loss_weight="uniform",
        batch_size=64,
        block_channels=CHANNELS,
        routing=None if method == "baseline" else routing,
        parameters=250_000,
        dataset="synthetic",
    )


def group_gramians(rng: np.random.Generator, steps: int, dim: int, noise: float, count: np.ndarray) -> np.ndarray:
    """(steps, G, G) Gramians of noisy group gradients; ``noise`` is the trace of the per-sample covariance.

    The true task gradients have norm 1. ``count`` (G,) are the samples of each group.
    """
    truth = np.zeros((K, dim))
    truth[:, :K] = np.linalg.cholesky(true_cosine())
    mean = np.repeat(truth, len(count) // K, axis=0)
    spread = np.sqrt(noise / dim / count)[:, None]
    gradients = mean + spread * rng.standard_normal((steps, len(count), dim))
    return gradients @ gradients.transpose(0, 2, 1)


def val_loss(method: str, seed: int, step: np.ndarray | float) -> np.ndarray:
    """(..., T) true validation loss: the level falls with t, all timesteps learn at the same speed."""
    level = np.linspace(0.6, 0.05, T)
    decay = np.exp(-np.asarray(step, dtype=float) / TAU[method])[..., None]
    return level * (1.0 + 0.02 * seed) * (0.5 + decay)


def dtr_mask(method: str, seed: int, channels: int) -> np.ndarray:
    """(T, C) masks: a window that slides over the channels (dtr), or random channels for each timestep."""
    width = int(BETA * channels)
    if method == "random":
        order = np.random.default_rng(seed).random((T, channels)).argsort(axis=1)
        return order < width
    start = np.round((channels - width) * np.linspace(0, 1, T) ** 4).astype(int)
    channel = np.arange(channels)
    return (channel >= start[:, None]) & (channel < start[:, None] + width)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Writes shards of one attempt below ``folder``."""

    folder: Path
    attempt: int = 1
    resumed_from: int = 0

    def write(self, table: str, name: str, columns: dict) -> None:
        metadata = {
            records.META_ATTEMPT: str(self.attempt),
            records.META_RESUMED_FROM: str(self.resumed_from),
            records.META_SCHEMA_VERSION: str(records.SCHEMA_VERSION),
        }
        schema = records.TABLES[table].with_metadata(metadata)
        (self.folder / table).mkdir(parents=True, exist_ok=True)
        arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), self.folder / table / f"{name}.parquet")


def loss_columns(split: str, method: str, seed: int, step: int, window_start: int) -> dict:
    """Rows of `timestep_loss` for one window: two samples per timestep, at 0.9 and 1.1 times the true loss."""
    mean = val_loss(method, seed, step)
    return {
        "step": [step] * T,
        "window_start": [window_start] * T,
        "split": [split] * T,
        "quantity": ["mse"] * T,
        "timestep": list(range(T)),
        "count": [2] * T,
        "sum": 2 * mean,
        "sum_sq": mean**2 * (0.9**2 + 1.1**2),
    }


def gramian_columns(rng: np.random.Generator, step: int, samples: int = 8, noise: float = 40.0) -> dict:
    count = np.full(K * HALVES, samples)
    gramians = [group_gramians(rng, 1, 48, noise, count)[0] for _ in LAYERS]
    return {
        "step": [step] * len(LAYERS),
        "layer": list(LAYERS),
        "halves": [HALVES] * len(LAYERS),
        "group_count": [count.tolist()] * len(LAYERS),
        "group_loss": [np.linspace(0.5, 0.1, K * HALVES).tolist()] * len(LAYERS),
        "gramian": [gramian.ravel().tolist() for gramian in gramians],
        "coverage": [1.0] * len(LAYERS),
    }


def activation_columns(method: str, seed: int, step: int) -> dict:
    rows: dict[str, list] = {field.name: [] for field in records.TABLES[records.CHANNEL_ACTIVATION]}
    for block, channels in CHANNELS.items():
        mask = np.ones((T, channels), bool) if method == "baseline" else dtr_mask(method, seed, channels)
        for site in ("input", "update"):
            for task, share in enumerate(mask.reshape(K, T // K, channels).mean(axis=1)):
                energy = share * np.linspace(1.0, 0.2, channels) * (1 + task / K)
                active = np.where(np.arange(channels) == channels - 1, 0.0, 0.9 * share)  # the last channel is dead
                row = (step, block, site, task, 1024, 0 * energy, energy, active)
                for name, value in zip(rows, row, strict=True):
                    rows[name].append(value)
    return rows


def write_telemetry(folder: Path, method: str, seed: int, task: int | None = None) -> None:
    """The ``telemetry`` folder of a complete run: two shards per table, manifest, and masks if routed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, len(method)])
    described = dataclasses.replace(manifest(method, seed), trained_task=task)
    (folder / "manifest.json").write_text(described.to_json())
    shards = Shards(folder)
    for part, steps in enumerate(np.array_split(STEPS, 2)):
        name = f"part-{part:05d}"
        windows = [loss_columns(split, method, seed, int(s), int(s) - 99) for s in steps for split in ("train", "val")]
        shards.write(records.TIMESTEP_LOSS, name, _concatenated(windows))
        shards.write(records.GRADIENT_GRAMIAN, name, _concatenated([gramian_columns(rng, int(s)) for s in steps]))
        shards.write(
            records.CHANNEL_ACTIVATION, name, _concatenated([activation_columns(method, seed, int(s)) for s in steps])
        )
    if method != "baseline":
        masks = {block: dtr_mask(method, seed, channels) for block, channels in CHANNELS.items()}
        np.savez(folder / "masks.npz", **masks)


def _concatenated(parts: list[dict]) -> dict:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def add_run(
    client: MlflowClient,
    experiment_id: str,
    method: str,
    seed: int,
    *,
    comparison: str = COMPARISON,
    status: str = "FINISHED",
    telemetry: bool = True,
    task: int | None = None,
) -> str:
    """Adds one training run to the store, or one specialist of a task, and returns its id."""
    tags = {
        records.TAG_KIND: records.KIND_TRAINING if task is None else records.KIND_SPECIALIST,
        records.TAG_METHOD: method,
        records.TAG_SEED: str(seed),
        records.TAG_COMPARISON: comparison,
    }
    run = client.create_run(experiment_id, run_name=f"{method}-{seed}", tags=tags)
    if telemetry:
        root = url2pathname(urlparse(run.info.artifact_uri).path)
        write_telemetry(Path(root) / records.TELEMETRY_DIR, method, seed, task)
    if status != "RUNNING":
        client.set_terminated(run.info.run_id, status)
    return run.info.run_id


def make_store(folder: Path, seeds: int = 2, methods: tuple[str, ...] = ("baseline", "random", "dtr")) -> str:
    """A SQLite store with one comparison of finished runs in the experiment `EXPERIMENT`; returns its URI."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment_id = client.create_experiment(EXPERIMENT, artifact_location=str(folder / "artifacts"))
    for seed in range(seeds):
        for method in methods:
            add_run(client, experiment_id, method, seed)
    return uri
