"""Rows as `dtr-lab affinity` writes them, with known truth, and a run that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from analysis.reading.telemetry import read_telemetry
from lightning_modules.tracking import records
from lightning_modules.tracking.shards import record_batch, shard_bytes
from tests.analysis import synthetic

K = synthetic.K
SAMPLES = 20


def transfer_rows(
    saved: np.ndarray,
    *,
    step: int = 100,
    measure: str = records.LOOK_AHEAD,
    updates: int = 1,
    repeat: int = 0,
    loss: np.ndarray | None = None,
    predicted: np.ndarray | None = None,
) -> dict:
    """One draw in which training on i saves the share ``saved[i, j]`` (K, K) of task j's mean loss ``loss`` (K,)."""
    loss = np.linspace(0.5, 0.1, K) if loss is None else loss
    change = -saved * loss
    unknown = np.full((K, K), np.nan)
    return {
        "step": step,
        "measure": measure,
        "optimizer": "sgd",
        "learning_rate": [0.1] * K,
        "repeat": repeat,
        "updates": updates,
        "source": list(range(K)),
        "count": [[SAMPLES] * K] * K,
        "before": [SAMPLES * loss] * K,
        "change": list(SAMPLES * change),
        "change_sq": list(SAMPLES * change**2),
        "predicted": list(unknown if predicted is None else -predicted * loss),
    }


def representation_rows(hsic: dict[str, np.ndarray], timesteps: list[int], *, step: int = 100, batch: int = 0) -> dict:
    """HSIC (M, M) of each block."""
    return {
        "step": step,
        "block": list(hsic),
        "batch": batch,
        "count": 64,
        "timesteps": [timesteps] * len(hsic),
        "hsic": [values.ravel() for values in hsic.values()],
    }


def run_with(folder: Path, *, transfers: Sequence[dict] = (), representations: Sequence[dict] = ()) -> xr.Dataset:
    """A run that measured these."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(synthetic.manifest().to_json())
    write(folder, transfers=transfers, representations=representations)
    run = read_telemetry(folder)
    run.attrs["name"] = "measured"
    return run


def write(folder: Path, *, transfers: Sequence[dict] = (), representations: Sequence[dict] = ()) -> None:
    """Adds to a ``telemetry`` folder; pieces of one checkpoint and measure share a file, as the command writes them."""
    files: dict[tuple[str, str], list[dict]] = {}
    for rows in transfers:
        files.setdefault((records.TASK_TRANSFER, f"{rows['measure']}-{rows['step']}"), []).append(rows)
    for rows in representations:
        files.setdefault((records.REPRESENTATION, f"representation-{rows['step']}"), []).append(rows)
    for (table, name), pieces in files.items():
        (folder / table).mkdir(exist_ok=True)
        batches = [record_batch(table, rows) for rows in pieces]
        (folder / table / f"{name}.parquet").write_bytes(shard_bytes(table, batches, 1, resumed_from=None))


def write_everything(folder: Path, seed: int, step: int = 1000) -> None:
    """Look-ahead, fine-tuning and representations of a run whose intervals help their neighbours most."""
    rng = np.random.default_rng(seed)
    distance = np.abs(np.subtract.outer(np.arange(K), np.arange(K)))
    saved = 0.05 * np.exp(-distance / 2)
    transfers = []
    for repeat in range(4):
        draw = saved + 0.003 * rng.standard_normal((K, K))
        transfers.append(transfer_rows(draw, step=step, repeat=repeat, predicted=1.1 * draw))
        transfers += [
            transfer_rows(5 * draw - 0.1, step=step, repeat=repeat, measure=records.FINE_TUNING, updates=updates)
            for updates in (10, 40)
        ]
    width = synthetic.T // K
    times = [low + at for low in range(0, synthetic.T, width) for at in (width // 4, 3 * width // 4)]
    near = np.exp(-np.abs(np.subtract.outer(times, times)) / 60)
    representations = [
        representation_rows(
            {block: near + 0.01 * np.diag(rng.random(len(times))) for block in synthetic.CHANNELS},
            times,
            step=step,
            batch=batch,
        )
        for batch in range(3)
    ]
    write(folder, transfers=transfers, representations=representations)


def with_losses(loss: np.ndarray, *, seed: int, task: int | None = None) -> xr.Dataset:
    """A finished run whose last validation losses are ``loss`` (K,); of a specialist if a task is named."""
    manifest = synthetic.manifest(seed=seed)
    manifest = type(manifest)(**{**manifest.__dict__, "trained_task": task})
    moments = np.zeros((3, 2, 2, K))
    moments[0] = 10
    moments[1, 0] = 10 * np.stack([2 * loss, loss])
    tasks = synthetic_tasks()
    return xr.Dataset(
        {"val_loss": (("moment", "quantity", "val_step", "task"), moments)},
        coords={"moment": ["count", "sum", "sum_sq"], "quantity": ["mse", "vb"], "val_step": [50, 100], **tasks},
        attrs={"seed": seed, "name": f"run-{seed}-{task}", "manifest": manifest.to_json()},
    )


def synthetic_tasks() -> dict:
    from analysis.gramians import task_coordinates

    manifest = synthetic.manifest()
    return dict(task_coordinates(manifest.interval_bounds, manifest.log_snr).coords)
