"""A saved view for MLflow's user interface: which charts, images and columns a comparison opens with.

By itself MLflow 3.17 lists charts alphabetically, starts every image at step 0, prints all parameters above each image
(thirty of them push the image off the screen) and shows neither metrics nor methods in the table of runs. A link cannot
change that, but a saved view can, the thing behind the button "Views": a tag of the experiment that holds the page's
state. Its format is MLflow's own affair; ``tests/browser`` notices when it changes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_modules.tracking.records import TAG_COMPARISON, TAG_METHOD, TAG_SEED

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG_PREFIX = "mlflow.sharedViewState."
COLUMNS = {
    f"tags.`{TAG_METHOD}`": 90,
    f"tags.`{TAG_SEED}`": 80,
    "metrics.`loss/val`": 130,
    "metrics.`conflict/mean_rate`": 145,
}
"""Columns to add -> their widths in pixels: MLflow's 100 cut off the longest heading."""
COLUMN_WIDTHS = {"attributes.`Run Name`": 260, "runDateAndNestInfo": 150, **COLUMNS, "duration": 80}
"""All columns from left to right -> their widths: methods before results, and all within a window of 1280 pixels."""
ORDER_BY = f"tags.`{TAG_METHOD}`"
IMAGES = {
    "images": ("conflict_cosine", "affinity_look_ahead", "affinity_representation"),
    "more images": ("affinity_fine_tuning", "samples"),
}
"""Section -> images. The first section stands above all curves, so it must not take more than one row."""
CURVES = {
    "loss": ("loss/val", "loss/train"),
    "conflict": ("conflict/mean_rate", "conflict/rate", "conflict/mean_cosine"),
    "activation": ("activation/effective_channels", "activation/dead_fraction"),
}
"""Section -> the charts that come first in it; MLflow adds those of the remaining metrics."""


def comparison_filter(comparison: str) -> str:
    """MLflow's search filter for the runs of one comparison."""
    mark = '"' if "'" in comparison else "'"
    return f"tags.`{TAG_COMPARISON}` = {mark}{comparison}{mark}"


def runs_filter(comparison: str | None) -> str:
    """MLflow's search filter for the runs of one comparison; all runs for None."""
    return "" if comparison is None else comparison_filter(comparison)


def save_view(client: MlflowClient, experiment_id: str, comparison: str | None, training_runs: Sequence[str]) -> str:
    """Writes the comparison's view into the experiment, over an earlier one.

    Args:
        client: Of the store.
        experiment_id: Where the runs are.
        comparison: Their ``dtr.comparison`` tag; None for a view of all runs.
        training_runs: Run ids whose images are shown, at the last step that all of them logged.

    Returns:
        The key of the view, for `mlflow_links.runs_url`.

    Raises:
        MlflowException: If the store does not take the tag.
    """
    name = "all runs" if comparison is None else f"comparison {comparison}"
    key = "dtr-" + hashlib.sha256(name.encode()).hexdigest()[:16]
    state = json.dumps(view_state(comparison, _last_common_steps(client, training_runs))).encode()
    now = int(time.time() * 1000)
    view = {
        "name": name,
        "createdAt": now,
        "updatedAt": now,
        "state": "deflate;" + base64.b64encode(zlib.compress(state)).decode(),
    }
    client.set_experiment_tag(experiment_id, TAG_PREFIX + key, json.dumps(view))
    return key


def view_state(comparison: str | None, image_steps: Mapping[str, int]) -> dict[str, Any]:
    """The page's state: filter and order of the runs, columns of the table, sections of charts.

    Sorted by time, MLflow's default, runs are nested under their parent, folded, and left out of the charts. Sorted by
    anything else they are listed flat and all drawn; sorted by method, seeds of one method stand together, and the
    comparison's own run, which has no method, comes last.

    Args:
        comparison: The ``dtr.comparison`` tag to filter on; None for all runs.
        image_steps: Image key -> step to show at first; images without one are left out.
    """
    charts = [
        _image_chart(section, key, image_steps[key])
        for section, keys in IMAGES.items()
        for key in keys
        if key in image_steps
    ]
    charts += [_line_chart(section, metric) for section, metrics in CURVES.items() for metric in metrics]
    return {
        "searchFilter": runs_filter(comparison),
        "orderByKey": ORDER_BY,
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(COLUMN_WIDTHS),
        "columnWidths": COLUMN_WIDTHS,
        "runsHiddenMode": "SHOW_ALL",  # else runs after the tenth are not drawn
        "compareRunSections": [_section(name) for name in ("images", *CURVES, "more images")],
        "compareRunCharts": charts,
        "isAccordionReordered": True,
    }


def _section(name: str) -> dict[str, Any]:
    common = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    return {"uuid": _section_id(name), "name": name} | common


def _chart(section: str, key: str) -> dict[str, Any]:
    common = {"runsCountToCompare": 100, "deleted": False, "isGenerated": False}
    return {"uuid": f"dtr-chart-{key}", "metricSectionId": _section_id(section)} | common


def _section_id(name: str) -> str:
    return f"dtr-section-{name.replace(' ', '-')}"


def _image_chart(section: str, key: str, step: int) -> dict[str, Any]:
    return _chart(section, key) | {"type": "IMAGE", "imageKeys": [key], "step": step, "showRunParams": False}


def _line_chart(section: str, metric: str) -> dict[str, Any]:
    return _chart(section, metric) | {
        "type": "LINE",
        "displayName": metric,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "scaleType": "linear",
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _last_common_steps(client: MlflowClient, training_runs: Sequence[str]) -> dict[str, int]:
    """Image key -> last step at which every run that has such images logged one."""
    from lightning_modules.tracking.publisher import published_images

    steps: dict[str, list[set[int]]] = {}
    for run_id in training_runs:
        of_run: dict[str, set[int]] = {}
        for key, step, _ in published_images(client, run_id):
            of_run.setdefault(key, set()).add(step)
        for key, logged in of_run.items():
            steps.setdefault(key, []).append(logged)
    return {key: max(set.intersection(*sets) or set.union(*sets)) for key, sets in steps.items()}
