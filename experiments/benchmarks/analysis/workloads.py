"""What is generated: trainings with the probes' schedules, as numbers of rows and shards."""

from __future__ import annotations

import dataclasses

import numpy as np

from lightning_modules.tracking.records import RunManifest

SHARD_SECONDS = 20.0
"""Rows wait this long at most before the real writer puts them into a shard (`lightning_modules.tracking.outbox`)."""
METHODS = ("baseline", "random", "dtr", "dtr-wide")
_LAYER_KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
_LAYERS_OUTSIDE = (
    "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table",
    "final_layer.adaLN_modulation.1",
)  # fmt: skip
_ROUTING = {"dtr": 0.8, "random": 0.8, "dtr-wide": 0.9}


@dataclasses.dataclass(frozen=True)
class Workload:
    """One training; 0 turns a measurement off, as it does for the probes.

    Attributes:
        steps: Optimizer steps.
        batch_size: Samples in each.
        seconds_per_step: Of the training, not of the benchmark: how many steps end up in one shard follows from it.
        checkpoint_every: Steps between two checkpoints, at which the writer puts on disk what it has.
        window: Steps between two sets of loss moments.
        validate_every: Steps between two validations.
        validation_samples: Of each validation.
        probe_every: Steps between two Gramians.
        activation_every: Steps between two measurements of channels.
        layers: Layers with Gramians.
        blocks: Residual blocks.
        channels: Of each block.
        num_timesteps: T.
        tasks: K.
        halves: Halves of each task.
        affinity: Whether `dtr-lab affinity` measured the last checkpoint, at its defaults.
    """

    steps: int
    batch_size: int
    seconds_per_step: float
    checkpoint_every: int
    window: int
    validate_every: int
    validation_samples: int
    probe_every: int
    activation_every: int
    layers: int
    blocks: int
    channels: int
    num_timesteps: int = 1000
    tasks: int = 8
    halves: int = 2
    affinity: bool = False

    def shard_ends(self) -> list[int]:
        """The last step of each shard: the writer makes one of every table after some seconds, and at checkpoints."""
        most = max(1, round(SHARD_SECONDS / self.seconds_per_step))
        ends = [0]
        while ends[-1] < self.steps:
            checkpoint = ends[-1] - ends[-1] % self.checkpoint_every + self.checkpoint_every
            ends.append(min(ends[-1] + most, checkpoint, self.steps))
        return ends[1:]

    @property
    def groups(self) -> int:
        """G."""
        return self.tasks * self.halves

    @property
    def bounds(self) -> list[int]:
        """K + 1 bounds of the intervals, uniform in t."""
        return [round(k * self.num_timesteps / self.tasks) for k in range(self.tasks + 1)]

    @property
    def block_names(self) -> list[str]:
        """Names of the residual blocks."""
        return [f"blocks.{block}" for block in range(self.blocks)]

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers as in a DiT's state dict, spread over its blocks."""
        outside = max(2, self.layers - len(_LAYER_KINDS) * self.blocks)
        inside = self.layers - outside
        of_block = [place * self.blocks // inside for place in range(inside)]
        names = [f"blocks.{b}.{_LAYER_KINDS[place - of_block.index(b)]}" for place, b in enumerate(of_block)]
        return [*_LAYERS_OUTSIDE[: outside - 1], *names, "final_layer.linear"]

    def times(self, every: int) -> list[int]:
        """The steps at which something on this schedule is measured."""
        return list(range(every, self.steps + 1, every)) if every else []

    def manifest(self, method: str, seed: int) -> RunManifest:
        """The manifest of one such training; its ``method`` is one of `METHODS`."""
        routing: dict[str, float | int | str | bool] | None = None
        if method in _ROUTING:
            routing = {"alpha": 4.0, "beta": _ROUTING[method], "variant": "paper", "seed": seed, "per_block": False}
        return RunManifest(
            method=method,
            seed=seed,
            num_timesteps=self.num_timesteps,
            interval_bounds=self.bounds,
            interval_spacing="uniform",
            log_snr=np.linspace(9.0, -10.0, self.num_timesteps).tolist(),
            target="epsilon",
            loss_weight="uniform",
            batch_size=self.batch_size,
            block_channels=dict.fromkeys(self.block_names, self.channels),
            routing=routing,
            parameters=18 * self.blocks * self.channels**2,
            dataset="generated",
            learning_rate=1e-4,
            flops_per_sample=6 * 256 * 12 * float(self.blocks * self.channels**2),
        )

    def facts(self) -> dict[str, int]:
        """Its size in numbers."""
        return {
            "steps": self.steps,
            "sample_losses": self.steps * self.batch_size,
            "loss_windows": len(self.times(self.window)),
            "validations": len(self.times(self.validate_every)),
            "timesteps": self.num_timesteps,
            "gradient_probes": len(self.times(self.probe_every)),
            "layers": self.layers,
            "groups": self.groups,
            "activation_probes": len(self.times(self.activation_every)),
            "blocks": self.blocks,
            "channels": self.channels,
            "shards": len(self.shard_ends()),
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that one benchmark measures.

    Attributes:
        long: The training that is loaded and reduced.
        compared: Of each of the runs that are compared.
        larger: Likewise, of runs with more of everything.
        seeds: Of each method among them.
        logged: What is read from Parquet and, logged as one metric for each number of a step, from MLflow.
    """

    long: Workload
    compared: Workload
    larger: Workload
    seeds: int
    logged: Workload


FULL = Plan(
    # DiT-XL for as long as in its paper. At ten steps a second every window and every probe has a shard of its own.
    long=Workload(
        steps=400_000,
        batch_size=256,
        seconds_per_step=0.1,
        checkpoint_every=10_000,
        window=200,
        validate_every=5_000,
        validation_samples=10_000,
        probe_every=200,
        activation_every=4_000,
        layers=100,
        blocks=28,
        channels=1152,
    ),
    # What `dtr-lab demo` trains and measures: experiments/digits with its probes.
    compared=Workload(
        steps=1_500,
        batch_size=64,
        seconds_per_step=0.02,
        checkpoint_every=500,
        window=200,
        validate_every=100,
        validation_samples=1_188,
        probe_every=10,
        activation_every=50,
        layers=26,
        blocks=4,
        channels=64,
        affinity=True,
    ),
    # The DiT-S/4 and the checkpoints of experiments/image_folder, at fifty steps a second.
    larger=Workload(
        steps=20_000,
        batch_size=256,
        seconds_per_step=0.02,
        checkpoint_every=10_000,
        window=200,
        validate_every=1_000,
        validation_samples=2_000,
        probe_every=200,
        activation_every=1_000,
        layers=56,
        blocks=12,
        channels=384,
    ),
    seeds=25,
    # As much as MLflow takes in a minute or so.
    logged=Workload(
        steps=24_000,
        batch_size=256,
        seconds_per_step=0.02,
        checkpoint_every=10_000,
        window=200,
        validate_every=0,
        validation_samples=0,
        probe_every=200,
        activation_every=0,
        layers=4,
        blocks=2,
        channels=1,
        num_timesteps=250,
    ),
)


def _quick(workload: Workload) -> Workload:
    return dataclasses.replace(
        workload,
        steps=2_000,
        validate_every=min(workload.validate_every, 500),
        validation_samples=100,
        activation_every=min(workload.activation_every, 500),
        layers=4,
        blocks=2,
        channels=16,
        num_timesteps=40,
        tasks=4,
    )


QUICK = Plan(
    _quick(FULL.long),
    _quick(FULL.compared),
    _quick(FULL.larger),
    2,
    dataclasses.replace(_quick(FULL.logged), steps=400),
)
"""A few seconds' worth of the same shape: a test that it runs."""
