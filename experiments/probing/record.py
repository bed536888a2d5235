"""Where `dtr-lab probe` puts what it measures: a folder, and a run of its own in MLflow."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from analysis.report.panels import ReportFigure
from experiments.probing.data import ProbeData
from experiments.probing.subject import Subject
from lightning_modules.folders import writable_folder
from lightning_modules.gradients import Gramian
from lightning_modules.timesteps import TimestepIntervals
from lightning_modules.tracking import records
from lightning_modules.tracking.logger import TrackingLogger
from lightning_modules.tracking.shards import record_batch, shard_bytes
from lightning_modules.tracking.writer import RunWriter

FIGURES_DIR = "figures"
SUMMARY_FILE = "summary.json"
TAG_CHECKPOINT = "dtr.probe.checkpoint"
TAG_MEASURED_RUN = "dtr.probe.run_id"
TAG_MEASURED_STEP = "dtr.probe.step"
TAG_WEIGHTS = "dtr.probe.weights"
TAG_STOPPED = "dtr.probe.stopped"
TAG_TASKS = "dtr.probe.tasks"
"""``8 intervals`` or ``1000 timesteps``."""

_SHARD_BYTES = 64_000_000


def output_folder(args: argparse.Namespace, subject: Subject) -> Path:
    """The folder for the files, created: the one named, else ``runs/probes/<run or file>``.

    Raises:
        UserInputError: If it cannot be written to.
    """
    stem = subject.path.stem if subject.run_id is None else f"{subject.run_id}-{subject.path.stem}"
    return writable_folder(args.out if args.out is not None else Path("runs") / "probes" / stem, "--out")


def manifest_of(
    subject: Subject, data: ProbeData, intervals: TimestepIntervals, batch_size: int
) -> records.RunManifest:
    """What a reader of the Gramians must know; the seed is that of the training, by which runs are paired."""
    module, routing = subject.module, subject.module.hparams.get("routing")
    return records.RunManifest(
        method=module.method,
        seed=module.seed,
        num_timesteps=module.diffusion.num_timesteps,
        interval_bounds=list(intervals.bounds),
        interval_spacing=intervals.spacing,
        log_snr=[round(float(value), 6) for value in module.diffusion.log_snr],
        target=module.diffusion.config.target,
        loss_weight=module.loss_weight.name,
        batch_size=batch_size,
        block_channels=subject.backbone.block_channels,
        routing=None if routing is None else dict(routing),
        parameters=sum(p.numel() for p in subject.backbone.parameters() if p.requires_grad),
        dataset=data.name,
    )


class ProbeRecord:
    """Writes one measurement to its folder and, unless told otherwise, to MLflow.

    Args:
        folder: Output folder. Gramians of an earlier measurement there are replaced.
        logger: Where to log, or None. Its run begins here.
    """

    def __init__(self, folder: Path, logger: TrackingLogger | None) -> None:
        self.folder = folder
        self.writer: RunWriter | None = None if logger is None else logger.writer
        self._batches: list[pa.RecordBatch] = []
        self._bytes = 0
        self._shards = 0
        for stale in (folder / records.TELEMETRY_DIR).glob(f"{records.GRADIENT_GRAMIAN}/part-*.parquet"):
            stale.unlink()

    def start(self, subject: Subject, tasks: str, settings: Mapping[str, Any]) -> None:
        """Notes what is measured and how."""
        if self.writer is None:
            return
        tags = {
            records.TAG_METHOD: subject.module.method,
            records.TAG_SEED: str(subject.module.seed),
            TAG_CHECKPOINT: str(subject.path.absolute()),
            TAG_WEIGHTS: subject.weights,
            TAG_TASKS: tasks,
        }
        known = {TAG_MEASURED_RUN: subject.run_id, TAG_MEASURED_STEP: subject.step}
        self.writer.set_tags(tags | {tag: str(value) for tag, value in known.items() if value is not None})
        self.writer.log_params(dict(settings))

    def log_manifest(self, manifest: records.RunManifest) -> None:
        """Keeps what makes the Gramians readable."""
        self.log_file(records.MANIFEST_PATH, manifest.to_json().encode())
        if self.writer is not None:
            self.writer.set_tags({records.TAG_DATASET: manifest.dataset})

    def log_gramian(self, number: int, gramian: Gramian, losses: np.ndarray, halves: int) -> None:
        """Hands over the Gramians of all layers of a batch."""
        values = gramian.values.float().cpu().numpy()
        layers = len(gramian.layers)
        rows: dict[str, Any] = {
            "step": number,
            "layer": list(gramian.layers),
            "halves": halves,
            "group_count": [gramian.counts.tolist()] * layers,
            "group_loss": [losses.tolist()] * layers,
            "gramian": values.reshape(layers, -1),
            "coverage": [gramian.coverage] * layers,
        }
        if self.writer is not None:
            self.writer.log_rows(records.GRADIENT_GRAMIAN, rows)
        batch = record_batch(records.GRADIENT_GRAMIAN, rows)
        self._batches.append(batch)
        self._bytes += batch.nbytes
        if self._bytes > _SHARD_BYTES:
            self._write_shard()

    def log_metrics(self, metrics: Mapping[str, float], number: int) -> None:
        """Hands over scalars for MLflow's charts, by batch."""
        if self.writer is not None:
            self.writer.log_metrics({key: value for key, value in metrics.items() if np.isfinite(value)}, number)

    def log_heatmap(self, key: str, image: np.ndarray, number: int) -> None:
        """Hands over a picture (H, W, 3) for MLflow's image slider."""
        if self.writer is not None:
            self.writer.log_image(key, image, number)

    def log_figure(self, figure: ReportFigure) -> None:
        """Writes a figure as PNG."""
        self.log_file(f"{FIGURES_DIR}/{figure.name}.png", figure.png)

    def log_file(self, name: str, content: bytes) -> None:
        """Writes a file, to the folder and to the run."""
        self.keep_file(name, content)
        if self.writer is not None:
            self.writer.log_file(name, content)

    def keep_file(self, name: str, content: bytes) -> None:
        """Writes a file to the folder alone."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def flush(self) -> None:
        """Completes the Gramians on the disk, so that they can be read."""
        if self._batches:
            self._write_shard()

    def finish(self, summary: Mapping[str, Any], stopped: str, note: str) -> None:
        """Writes the summary, and ends the run."""
        self.flush()
        self.log_file(SUMMARY_FILE, (json.dumps(summary, indent=1) + "\n").encode())
        if self.writer is not None:
            self.writer.set_tags({TAG_STOPPED: stopped, "mlflow.note.content": note})
            self.writer.close("FINISHED")

    def abandon(self, status: str) -> None:
        """Ends the run after an error or Ctrl-C; what was measured stays readable."""
        self.flush()
        if self.writer is not None:
            self.writer.close(status)

    def _write_shard(self) -> None:
        self._shards += 1
        name = f"{records.TELEMETRY_DIR}/{records.GRADIENT_GRAMIAN}/part-{self._shards:05d}.parquet"
        self.keep_file(name, shard_bytes(records.GRADIENT_GRAMIAN, self._batches, attempt=1, resumed_from=0))
        self._batches, self._bytes = [], 0


def tracking_logger(args: argparse.Namespace) -> TrackingLogger | None:
    """The logger that the options ask for; creates no run yet.

    Raises:
        UserInputError: If the store cannot be used.
    """
    if args.no_tracking:
        return None
    return TrackingLogger(args.tracking_uri, experiment=args.experiment, tags={records.TAG_KIND: records.KIND_PROBE})


def settings_of(args: argparse.Namespace, subject: Subject, data: ProbeData) -> dict[str, Any]:
    """The settings of a measurement, for MLflow and the summary."""
    module = subject.module
    return {
        "checkpoint": str(subject.path),
        "weights": subject.weights,
        "data": data.name,
        "samples": len(data),
        "batch_size": args.batch_size,
        "halves": args.halves,
        "seed": args.seed,
        "loss_weight": module.loss_weight.name,
        "diffusion": dataclasses.asdict(module.diffusion.config),
    }
