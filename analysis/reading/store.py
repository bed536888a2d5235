"""Which MLflow store `analysis` reads, what to say if it cannot be read, and which runs an experiment there has."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from mlflow.exceptions import MlflowException

from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_CONNECT_TIMEOUT_SECONDS = 5.0


def locate_store(tracking_uri: str | None = None) -> str:
    """The store to read: the argument, else ``MLFLOW_TRACKING_URI``, else the nearest ``mlflow.db`` upwards from here.

    Looking upwards lets a notebook in ``notebooks/`` find the store that ``make demo`` wrote at the root.

    Raises:
        UserInputError: If there is no store there (MLflow itself would create an empty one), or no server answers.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        here = Path.cwd()
        candidates = [folder / "mlflow.db" for folder in (here, *here.parents)]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise UserInputError(
                f"no mlflow.db in {here} or above it: run `make demo` to make runs, or name a store "
                "(--tracking-uri, tracking_uri= or MLFLOW_TRACKING_URI)"
            )
        return f"sqlite:///{found}"
    parsed = urlparse(uri)
    if parsed.scheme == "sqlite":
        path = Path(uri.removeprefix("sqlite:///"))
        if not path.is_file():
            raise UserInputError(f"no MLflow store at {path.resolve()} (from {uri!r}): is the path right?")
    elif parsed.scheme in ("http", "https"):
        port = parsed.port or (443 if parsed.scheme == "https" else 80)
        try:
            # MLflow's own client retries for minutes before it gives up.
            socket.create_connection((parsed.hostname or "", port), _CONNECT_TIMEOUT_SECONDS).close()
        except OSError as error:
            raise UserInputError(f"no MLflow server answers at {uri}: {error}") from error
    elif parsed.scheme in ("", "file"):
        raise UserInputError(
            f"{uri!r} is not a store DTR Lab reads: use sqlite:///PATH/mlflow.db or http://HOST:PORT "
            "(an old mlruns folder converts with `mlflow migrate-filestore`)"
        )
    return uri


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """What MLflow raises inside becomes a `UserInputError` that names the store."""
    try:
        yield
    except MlflowException as error:
        raise UserInputError(f"cannot read the MLflow store {uri}: {error.message}") from error


def logged_runs(
    client: MlflowClient, experiment_id: str, *, kind: str | None = None, comparison: str | None = None
) -> list[Run]:
    """All runs of an experiment that are not deleted, whatever became of them, the oldest first.

    Args:
        client: Of the store.
        experiment_id: MLflow's.
        kind: Only runs with this tag `records.TAG_KIND`.
        comparison: Only runs with this tag `records.TAG_COMPARISON`.
    """
    runs: list[Run] = []
    token = None
    while True:  # a page has a thousand runs
        page = client.search_runs(
            [experiment_id],
            filter_string="" if kind is None else f"tags.`{records.TAG_KIND}` = '{kind}'",
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        runs.extend(page)
        token = page.token
        if not token:
            break
    # Not by the filter: a comparison's name may hold quotes.
    return [run for run in runs if comparison is None or run.data.tags.get(records.TAG_COMPARISON) == comparison]
