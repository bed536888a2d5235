"""Which MLflow store, is it usable, and how to reach it: the only place that interprets tracking URIs.

MLflow is imported inside the functions: it takes seconds, and `dtr-lab --help` must not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from lightning_modules.errors import UserInputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

try:
    import fcntl
except ImportError:  # Windows: concurrent first use of a new database is not guarded there
    fcntl = None  # type: ignore[assignment]

_SERVERS = ("http", "https")
_DATABASES = ("postgresql", "mysql", "mssql")
_CONNECT_SECONDS = 4


def resolve_tracking_uri(uri: str | None = None) -> str:
    """The store to use: the argument, else ``MLFLOW_TRACKING_URI`` as it stands now, else ``mlflow.db`` here."""
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    return chosen or f"sqlite:///{(Path.cwd() / 'mlflow.db').as_posix()}"


def check_store(uri: str) -> None:
    """Finds out in under five seconds, and without creating anything, whether a store can be used.

    Raises:
        UserInputError: For an unknown scheme, MLflow's former file store, an SQLite path that cannot be written or is
            no database, and a server or database that does not answer.
    """
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme == "sqlite":
        _check_sqlite(uri)
    elif scheme in _SERVERS:
        _check_server(uri)
    elif scheme in _DATABASES:
        _check_database(uri)
    elif scheme in ("", "file"):
        raise UserInputError(
            f"tracking URI {uri!r} means MLflow's file store, which MLflow no longer writes: use "
            "sqlite:///mlflow.db, and move old runs there with `mlflow migrate-filestore`"
        )
    else:
        raise UserInputError(
            f"tracking URI {redacted(uri)!r} has the unknown scheme {scheme!r}: use sqlite:///PATH, "
            "http(s)://HOST:PORT, or a postgresql://, mysql:// or mssql:// database"
        )


def redacted(uri: str) -> str:
    """The URI without its user name and password, fit for messages and files."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return uri if host == parts.netloc else urlunsplit(parts._replace(netloc=host))


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of an SQLite store's file; None for any other kind of store.

    Raises:
        UserInputError: If the URI names no file (an in-memory database would be lost).
    """
    if urlsplit(uri).scheme.split("+")[0] != "sqlite":
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        database = make_url(uri).database
    except ArgumentError as error:
        raise UserInputError(f"tracking URI {uri!r} is not valid: use sqlite:///PATH ({error})") from None
    if not database or database == ":memory:":
        raise UserInputError(f"tracking URI {uri!r} names no file: use sqlite:///PATH")
    return Path(database).absolute()


def mlflow_client(uri: str) -> MlflowClient:
    """A client of a store, which is set up first if it is a new SQLite file.

    Safe to call from several processes at once: MLflow's own first initialisation is not, so it runs under a lock.

    Raises:
        UserInputError: If the database was written by an incompatible MLflow.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    path = sqlite_path(uri)
    if path is None:
        # Telemetry is kept on disk and sent again by `delivery`; MLflow's own four minutes of retries, each with a
        # line on the terminal, would only hide from it that the server is away. Both are read at each request.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        return MlflowClient(tracking_uri=uri)
    try:
        with _exclusive(path.with_name(path.name + ".lock")):
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)  # the store is opened by its first use
    except (MlflowException, OSError) as error:
        raise UserInputError(f"the MLflow database {path} cannot be used: {error}") from error
    return client


def ensure_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, created if need be, also when another process creates it at the same moment.

    On SQLite its artifacts lie beside the database, ``<folder>/mlartifacts/<name>``; MLflow would put them under
    whatever the working directory happened to be.

    Raises:
        UserInputError: If the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        path = sqlite_path(uri)
        location = (path.parent / "mlartifacts" / _folder_name(name)).as_uri() if path else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise UserInputError(
            f"experiment {name!r} was deleted: choose another name, or bring it back with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    return experiment.experiment_id


def _folder_name(experiment: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in experiment).lstrip(".") or "_"


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_sqlite(uri: str) -> None:
    path = sqlite_path(uri)
    assert path is not None
    if path.exists():
        try:
            with path.open("r+b") as file:
                start = file.read(16)
        except OSError as error:
            raise UserInputError(f"the SQLite store {path} cannot be written: {error.strerror}") from None
        if start and start != b"SQLite format 3\0":
            raise UserInputError(f"{path} is not an SQLite database: choose another path for the tracking store")
    elif not path.parent.is_dir():
        raise UserInputError(f"the folder {path.parent} of the SQLite store does not exist: create it first")
    elif not os.access(path.parent, os.W_OK):
        raise UserInputError(f"the SQLite store cannot be created: {path.parent} is not writable")


def _check_server(uri: str) -> None:
    import requests

    try:
        response = requests.get(uri.rstrip("/") + "/health", timeout=_CONNECT_SECONDS)
    except requests.exceptions.SSLError:
        return  # it answers; whether to trust it is decided by MLflow's own TLS settings
    except (requests.exceptions.RequestException, ValueError) as error:
        reason = type(error).__name__
        raise UserInputError(
            f"no MLflow server answers at {redacted(uri)} ({reason}): start it with "
            "`mlflow server --host 127.0.0.1`, or correct the tracking URI"
        ) from None
    if response.status_code == 403:
        raise UserInputError(
            f"the server at {redacted(uri)} refuses this host name: start it with --allowed-hosts, or use an address"
        )
    if response.status_code >= 500:
        raise UserInputError(f"the MLflow server at {redacted(uri)} is out of order (HTTP {response.status_code})")
    _check_api(uri)


def _check_api(uri: str) -> None:
    """Something answers at the address; MLflow must be what it is, and let us in."""
    from mlflow.exceptions import MlflowException

    try:
        mlflow_client(uri).search_experiments(max_results=1)
    except MlflowException as error:
        said = str(error).splitlines()[0][:200]
        raise UserInputError(
            f"what answers at {redacted(uri)} is no MLflow server, or does not let you in: {said}. Correct the "
            "tracking URI, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        ) from None


def _check_database(uri: str) -> None:
    import sqlalchemy

    wait = {} if uri.startswith("mssql") else {"connect_timeout": _CONNECT_SECONDS}
    try:
        engine = sqlalchemy.create_engine(uri, connect_args=wait)
        engine.connect().close()
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError) as error:
        cause = str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise UserInputError(f"the tracking database {redacted(uri)} cannot be reached: {cause}") from None
