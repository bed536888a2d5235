"""The schema of everything a run leaves behind: Parquet tables, the manifest, and metric names.

Written once, here, and imported by both sides: the probes that write and `analysis` that reads. No torch.

Conventions used by every table:

- ``step`` counts optimizer steps from 1. What is measured while training carries the number of the step it is part of
  (gradients and activations of step n belong to the weights before that step); a validation, that of the step it
  follows. So a checkpoint at step n separates what lies before it, ``step <= n``, from what training on measures.
- A *task* is a timestep interval, numbered from low noise (0) to high noise (K - 1).
- Gradient probes split each task into ``halves`` disjoint sets of samples, so that cross-half products are free of
  sampling noise. Group ``g = task * halves + half``; there are ``G = K * halves`` groups.
- Tables hold sufficient statistics (counts, sums, inner products). Everything else is derived in `analysis`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1

TELEMETRY_DIR = "telemetry"
"""Artifact folder of a run; shards lie at ``telemetry/<table>/<shard>.parquet``."""
MANIFEST_PATH = f"{TELEMETRY_DIR}/manifest.json"
MASKS_PATH = f"{TELEMETRY_DIR}/masks.npz"
"""Channel masks of a routed run: one boolean array ``(T, C)`` per block, keyed by block name."""
CONFIG_PATH = "config.yaml"

TIMESTEP_LOSS = "timestep_loss"
GRADIENT_GRAMIAN = "gradient_gramian"
CHANNEL_ACTIVATION = "channel_activation"
TRAINING_TIME = "training_time"
TASK_WEIGHT = "task_weight"
TASK_TRANSFER = "task_transfer"
REPRESENTATION = "representation"

LOOK_AHEAD = "look_ahead"
FINE_TUNING = "fine_tuning"

_TEXT = pa.dictionary(pa.int32(), pa.string())

TABLES: dict[str, pa.Schema] = {
    # Moments of the unweighted per-sample loss over the steps (window_start, step], one row per timestep that occurred.
    TIMESTEP_LOSS: pa.schema(
        [
            ("step", pa.int64()),
            ("window_start", pa.int64()),
            ("split", _TEXT),  # "train" (live weights) or "val" (EMA weights, fixed noise and t)
            ("quantity", _TEXT),  # "mse" (of the model's target) or "vb" (bits per dimension)
            ("timestep", pa.int32()),
            ("count", pa.int64()),
            ("sum", pa.float64()),
            ("sum_sq", pa.float64()),
        ]
    ),
    # Inner products of the gradients of the groups' mean training losses, one row per layer.
    GRADIENT_GRAMIAN: pa.schema(
        [
            ("step", pa.int64()),
            ("layer", _TEXT),  # module name as in the state dict, e.g. "blocks.0.attn.qkv"
            ("halves", pa.int8()),
            ("group_count", pa.list_(pa.int32())),  # (G,) samples
            ("group_loss", pa.list_(pa.float32())),  # (G,) mean training loss
            ("gramian", pa.list_(pa.float32())),  # (G * G,) row major
            ("coverage", pa.float64()),  # share of the parameters, over all layers, that the products are exact for
        ]
    ),
    # Moments over samples and tokens (or pixels) of what a block reads and writes.
    CHANNEL_ACTIVATION: pa.schema(
        [
            ("step", pa.int64()),
            ("block", _TEXT),
            ("site", _TEXT),  # "input": what the residual branches read (masked); "update": what the block adds
            ("task", pa.int32()),
            ("count", pa.int64()),  # samples x tokens
            ("mean", pa.list_(pa.float32())),  # (C,)
            ("mean_square", pa.list_(pa.float32())),  # (C,)
            ("active_fraction", pa.list_(pa.float32())),  # (C,) share of entries above the activity threshold
        ]
    ),
    # How long training took: time in training steps, probes included, without validation, sampling and start-up.
    TRAINING_TIME: pa.schema(
        [
            ("step", pa.int64()),
            ("seconds", pa.float64()),  # since step 0, over all attempts that led to this step
        ]
    ),
    # Weights that a multi-task method gave the tasks' losses, averaged over the steps (window_start, step].
    TASK_WEIGHT: pa.schema(
        [
            ("step", pa.int64()),
            ("window_start", pa.int64()),
            ("weight", pa.list_(pa.float64())),  # (K,), 1 for each in plain training
        ]
    ),
    # What training a checkpoint on one task does to the losses of all: a row per source, repeat and number of updates.
    TASK_TRANSFER: pa.schema(
        [
            ("step", pa.int64()),  # of the checkpoint
            ("measure", _TEXT),  # LOOK_AHEAD (one update) or FINE_TUNING (many)
            ("optimizer", _TEXT),  # "sgd" or "adamw"
            ("learning_rate", pa.float64()),
            ("repeat", pa.int32()),  # independent draw of the samples trained on
            ("updates", pa.int32()),  # made so far
            ("source", pa.int32()),  # the task trained on
            ("count", pa.list_(pa.int32())),  # (K,) samples of each task that the losses are of
            ("before", pa.list_(pa.float64())),  # (K,) sum of their losses before the updates
            ("change", pa.list_(pa.float64())),  # (K,) sum over the same samples of loss after - loss before
            ("change_sq", pa.list_(pa.float64())),  # (K,) sum of the squares of these differences
            ("predicted", pa.list_(pa.float64())),  # (K,) first-order prediction of the *mean* change; NaN if unknown
        ]
    ),
    # Unbiased HSIC between what a block puts out at two timesteps, for the same images: linear CKA is a ratio of them.
    REPRESENTATION: pa.schema(
        [
            ("step", pa.int64()),  # of the checkpoint
            ("block", _TEXT),
            ("batch", pa.int32()),  # of images; estimates of disjoint batches add up
            ("count", pa.int32()),  # images in it
            ("timesteps", pa.list_(pa.int32())),  # (M,) probed timesteps, increasing
            ("hsic", pa.list_(pa.float64())),  # (M * M,) row major
        ]
    ),
}

# Keys of the Parquet metadata of shards (values are decimal strings). What is measured of a checkpoint after the
# training carries the attempt that wrote the checkpoint, and leaves META_RESUMED_FROM to that attempt's own shards.
META_ATTEMPT = b"dtr.attempt"
"""1 for the first start of a run, counted up by each resume."""
META_RESUMED_FROM = b"dtr.resumed_from"
"""Step of the checkpoint this attempt started from (0 for a fresh start).

A reader drops rows of earlier attempts with ``step > resumed_from`` of any later one: the later attempt has
measured those steps again.
"""
META_SCHEMA_VERSION = b"dtr.schema_version"

TAG_COMPARISON = "dtr.comparison"
TAG_METHOD = "dtr.method"
TAG_SEED = "dtr.seed"
TAG_DATASET = "dtr.dataset"
TAG_PARAMETERS = "dtr.parameters"
TAG_GIT_COMMIT = "dtr.git_commit"
TAG_CELL = "dtr.cell"
"""Which cell of a sweep a run belongs to, as `cell_tag` writes it: ``"routing=dtr,optimisation=min_snr"``."""
TAG_SETTINGS = "dtr.settings"
"""Digest of all settings of a run of a sweep, seed included: equal exactly where the trainings are."""
TAG_KIND = "dtr.kind"
KIND_TRAINING = "training"
"""A trained model."""
KIND_SPECIALIST = "specialist"
"""A model trained on a single task, to measure negative transfer."""
KIND_PROBE = "probe"
"""A measurement of a checkpoint."""
KIND_COMPARISON = "comparison"
"""The parent run that holds a report."""


@dataclasses.dataclass(frozen=True)
class RunManifest:
    """What a reader must know to interpret a run's tables, without importing the training code.

    Attributes:
        method: Routing and optimisation, such as ``"baseline"`` or ``"dtr+min_snr+upgrad"``; see `method_tag`.
        seed: Seed of initialisation, data order, t and noise.
        num_timesteps: T.
        interval_bounds: K + 1 increasing integers; task k holds the timesteps ``bounds[k] <= t < bounds[k + 1]``.
        interval_spacing: How the bounds came about: ``"uniform"``, ``"log_snr"`` or ``"explicit"``.
        log_snr: Natural logarithm of the signal-to-noise ratio at each timestep, length T.
        target: ``"epsilon"``, ``"x0"`` or ``"v"``.
        loss_weight: Name of the weighting of timesteps, such as ``"uniform"`` or ``"min_snr"``.
        batch_size: Samples per optimizer step, over all processes.
        block_channels: Channels of each residual block by name, in network order.
        routing: The fields of `masks.MaskConfig` (older runs lack ``kind`` and what came later), or None if plain.
        parameters: Number of trainable parameters.
        dataset: Name of the data set.
        learning_rate: Peak learning rate, or None if unknown (runs of earlier versions, published files).
        flops_per_sample: Floating-point operations (two per multiply-add) of one sample's forward and backward pass
            through matrix products, convolutions and attention; None if unknown.
        trained_task: The only task that was trained, for a specialist; None if all were.
    """

    method: str
    seed: int
    num_timesteps: int
    interval_bounds: list[int]
    interval_spacing: str
    log_snr: list[float]
    target: str
    loss_weight: str
    batch_size: int
    block_channels: dict[str, int]
    routing: dict[str, Any] | None
    parameters: int
    dataset: str
    schema_version: int = SCHEMA_VERSION
    learning_rate: float | None = None
    flops_per_sample: float | None = None
    trained_task: int | None = None

    def to_json(self) -> str:
        """The manifest as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> RunManifest:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: If the manifest was written by a newer schema than this one.
        """
        fields = json.loads(text)
        version = fields.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"manifest has schema version {version}, this DTR Lab reads {SCHEMA_VERSION}: "
                "read the run with the version that wrote it"
            )
        return cls(**fields)


def cell_tag(choices: Mapping[str, str]) -> str:
    """The value of `TAG_CELL` for the choice made on each axis. Names hold neither ``,`` nor ``=``."""
    return ",".join(f"{axis}={choice}" for axis, choice in choices.items())


def cell_choices(tag: str) -> dict[str, str]:
    """Axis -> choice: inverse of `cell_tag`."""
    return dict(part.split("=", 1) for part in tag.split(",") if part)


def interval_label(low: int, high: int, num_timesteps: int) -> str:
    """Name of the timestep interval ``low <= t < high`` for metric keys and axes, e.g. ``t000-124``.

    Zero-padded to the width of T - 1, so that alphabetical order is the order of noise.
    """
    width = len(str(num_timesteps - 1))
    return f"t{low:0{width}d}-{high - 1:0{width}d}"


def interval_labels(bounds: Sequence[int]) -> list[str]:
    """The labels of all intervals given their K + 1 bounds."""
    return [interval_label(low, high, bounds[-1]) for low, high in itertools.pairwise(bounds)]
