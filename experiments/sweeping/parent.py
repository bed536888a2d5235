"""The run that stands for a sweep: it says whether the sweep runs, holds its file, and all runs are nested below it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from experiments.comparisons import create_comparison
from experiments.sweeping.cells import Place
from experiments.sweeping.spec import Sweep
from experiments.trainings import Training, report_failures
from lightning_modules.tracking.store import mlflow_client

_LOGS_SHOWN = 3


def under_parent(sweep: Sweep, place: Place, work: Callable[[Place], bool]) -> bool:
    """Does the work while the parent run is RUNNING, and ends it with what became of it.

    Args:
        sweep: The sweep; its parent is created, or found where an earlier call left it.
        place: Where its runs go.
        work: Given the place with the parent; whether all went well.
    """
    parent = create_comparison(place.uri, experiment=sweep.experiment, comparison=sweep.name)
    client = mlflow_client(place.uri)
    client.update_run(parent, status="RUNNING")
    status = "FAILED"
    try:
        client.log_artifact(parent, str(sweep.path), "sweep")
        succeeded = work(dataclasses.replace(place, parent=parent))
        status = "FINISHED" if succeeded else "FAILED"
        return succeeded
    except KeyboardInterrupt:
        status = "KILLED"
        print("The same command goes on from here.")
        raise
    finally:
        client.set_terminated(parent, status)


def report_failed(failed: Sequence[Training]) -> bool:
    """Says which trainings failed and why, the ends of a few logs included; whether there are any."""
    report_failures(failed[:_LOGS_SHOWN])
    if failed:
        print(f"\nFailed: {', '.join(job.name for job in failed)}; their logs are in {failed[0].log.parent}")
    return bool(failed)
