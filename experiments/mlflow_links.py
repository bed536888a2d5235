"""Links into MLflow's user interface: found out by driving MLflow 3.17 in a browser, kept true by ``tests/browser``."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from experiments.mlflow_view import ORDER_BY, runs_filter

REPORT = "report.html"
_MODEL_TRAINING = {"workflowType": "machine_learning"}
"""Switches from the GenAI view to model training, only as part of the query *after* the ``#``."""


def runs_url(
    base_url: str, experiment_id: str, comparison: str | None, *, view: str | None = None, charts: bool = False
) -> str:
    """Link to the runs of one comparison, or of the whole experiment.

    The order must not be by time, see `mlflow_view.view_state`.

    Args:
        base_url: Where MLflow's server is; without it the link works on any of its pages.
        experiment_id: Id, not name.
        comparison: The runs' ``dtr.comparison`` tag; None for all runs.
        view: Key of the view that `mlflow_view.save_view` wrote; it adds what a link alone cannot say.
        charts: Charts and images side by side, where images have their step slider, rather than the table.
    """
    query = _MODEL_TRAINING | {"compareRunsMode": "CHART" if charts else "TABLE"}
    if view is not None:
        query["viewStateShareKey"] = view  # has filter and order in it; beside them MLflow would not apply the rest
    else:
        query |= {"searchFilter": runs_filter(comparison), "orderByKey": ORDER_BY, "orderByAsc": "true"}
    return f"{_experiment_page(base_url, experiment_id)}/runs?{urlencode(query, quote_via=quote)}"


def run_url(base_url: str, experiment_id: str, run_id: str) -> str:
    """Link to the page of one run."""
    return f"{_experiment_page(base_url, experiment_id)}/runs/{run_id}?{urlencode(_MODEL_TRAINING)}"


def artifact_url(base_url: str, experiment_id: str, run_id: str, path: str) -> str:
    """Link to one file of a run, shown in MLflow's artifact viewer."""
    page = f"{_experiment_page(base_url, experiment_id)}/runs/{run_id}/artifacts/{quote(path)}"
    return f"{page}?{urlencode(_MODEL_TRAINING)}"


def _experiment_page(base_url: str, experiment_id: str) -> str:
    # Without a base, an address relative to the page: it holds behind any host and prefix.
    slash = "/" if base_url else ""
    return f"{base_url.rstrip('/')}{slash}#/experiments/{experiment_id}"
