"""Comparisons: the runs that belong together by a tag, and the parent run that stands for them and holds the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records

if TYPE_CHECKING:
    from mlflow.entities import Run


def create_comparison(tracking_uri: str, *, experiment: str, comparison: str) -> str:
    """The parent run that stands for a comparison and will hold its report; created if there is none yet.

    Create it before training to nest the runs below it (``tracking.parent_run_id``). `compare` finishes it.

    Args:
        tracking_uri: The MLflow store; a new SQLite store is set up.
        experiment: Name of the experiment, created if need be.
        comparison: Id of the comparison, the ``dtr.comparison`` tag of its runs.

    Returns:
        The MLflow run id.
    """
    from analysis.reading.store import logged_runs
    from lightning_modules.tracking.store import ensure_experiment, mlflow_client

    client = mlflow_client(tracking_uri)
    experiment_id = ensure_experiment(client, tracking_uri, experiment)
    found = _newest_parent(logged_runs(client, experiment_id, kind=records.KIND_COMPARISON), comparison)
    if found is not None:
        return found
    tags = {records.TAG_KIND: records.KIND_COMPARISON, records.TAG_COMPARISON: comparison}
    return client.create_run(experiment_id, run_name=f"comparison {comparison}", tags=tags).info.run_id


def find_comparison(tracking_uri: str, *, experiment: str, comparison: str) -> str | None:
    """The parent run of a comparison that runs belong to already; None if they have no parent.

    Raises:
        UserInputError: If no run of the experiment belongs to that comparison.
    """
    from analysis.reading.store import logged_runs
    from lightning_modules.tracking.store import mlflow_client

    client = mlflow_client(tracking_uri)
    known = client.get_experiment_by_name(experiment)
    runs = [] if known is None else logged_runs(client, known.experiment_id)
    tags = {tag for run in runs if (tag := run.data.tags.get(records.TAG_COMPARISON))}
    if known is None or comparison not in tags:
        raise UserInputError(
            f"no run of experiment {experiment!r} belongs to a comparison {comparison!r}; there are: "
            f"{', '.join(sorted(tags)) or 'none'}"
        )
    return _newest_parent(runs, comparison)


def _newest_parent(runs: Sequence[Run], comparison: str) -> str | None:
    """Of runs with the oldest first."""
    wanted = {records.TAG_KIND: records.KIND_COMPARISON, records.TAG_COMPARISON: comparison}
    parents = [run for run in runs if wanted.items() <= run.data.tags.items()]
    return parents[-1].info.run_id if parents else None
