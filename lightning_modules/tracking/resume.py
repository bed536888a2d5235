"""Continuing a run from a checkpoint: what an earlier attempt measured beyond it must not be there twice."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from lightning_modules.tracking.publisher import published_images
from lightning_modules.tracking.shards import rows_up_to
from lightning_modules.tracking.spool import Spool, SpoolItem

if TYPE_CHECKING:
    from mlflow import MlflowClient

NONFINITE_COUNT = "health/nonfinite_count"


@dataclasses.dataclass
class Published:
    """What MLflow already holds of a run that is resumed from step s.

    Attributes:
        metrics: (key, step) of metric values with step > s. MLflow can neither delete nor replace these, so the
            resumed attempt does not log them again; a second value would show as a zigzag in every chart.
        images: (key, step) of images with step > s.
        params: All parameters; MLflow does not let them change.
        nonfinite_count: Value of the metric of that name at s.
    """

    metrics: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    images: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    nonfinite_count: int = 0


def already_published(client: MlflowClient, run_id: str, step: int) -> Published:
    """Looks up once, at resume, what lies beyond a checkpoint's step."""
    data = client.get_run(run_id).data
    found = Published(params=dict(data.params))
    for key in data.metrics:
        history = client.get_metric_history(run_id, key)
        found.metrics.update((key, point.step) for point in history if point.step > step)
        if key == NONFINITE_COUNT:
            found.nonfinite_count = int(max((point.value for point in history if point.step <= step), default=0))
    images = published_images(client, run_id)
    found.images.update((key, image_step) for key, image_step, _ in images if image_step > step)
    return found


def prune_leftovers(spool: Spool, attempt: int, step: int) -> dict[str, str]:
    """Drops from a spool what the attempt starting at a step will measure again, and earlier attempts' end.

    Args:
        spool: The spool that earlier attempts left.
        attempt: The attempt that starts now.
        step: Step of the checkpoint it starts from.

    Returns:
        Parameters that are still waiting in the spool.
    """
    params: dict[str, str] = {}
    for path in spool.pending():
        try:
            item = spool.read(path)
        except (json.JSONDecodeError, KeyError):
            spool.reject(path)
            continue
        kept = _up_to(item, step) if item.attempt < attempt else item
        if kept is not item:
            spool.replace(path, kept)
        if kept is not None and kept.kind == "batch":
            params.update(kept.header["params"])
    return params


def _up_to(item: SpoolItem, step: int) -> SpoolItem | None:
    """The item without measurements beyond a step; None if nothing remains."""
    if item.kind == "status":
        return None
    if item.kind == "image":
        return item if item.header["step"] <= step else None
    if item.kind == "rows":
        rows = rows_up_to(item.payload, step)
        if rows is None or rows is item.payload:
            return None if rows is None else item
        return dataclasses.replace(item, payload=rows)
    if item.kind == "batch":
        metrics = [metric for metric in item.header["metrics"] if metric[3] <= step]
        if len(metrics) == len(item.header["metrics"]):
            return item
        return dataclasses.replace(item, header={**item.header, "metrics": metrics})
    return item


def drop_end(spool: Spool) -> None:
    """Drops an unpublished end of the run, which goes on."""
    for path in spool.pending():
        if path.suffix == ".status":
            spool.replace(path, None)
