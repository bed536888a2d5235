"""``dtr-lab ui``: MLflow's user interface on the right store, opened at the runs that belong together."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

from experiments.mlflow_links import REPORT, artifact_url, runs_url
from experiments.mlflow_view import save_view
from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import KIND_COMPARISON, KIND_TRAINING, TAG_COMPARISON, TAG_KIND

if TYPE_CHECKING:
    from mlflow import MlflowClient

HOST = "127.0.0.1"
LATEST = "latest"
APP, START = "dtr-lab", "/start"
"""Of `experiments.mlflow_app`, which imports MLflow's server: too slow for here."""
_PORTS_TRIED = 100
_START_SECONDS = 120.0
_STOP_SECONDS = 5.0
_LOG_LINES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("--tracking-uri", help="MLflow store (default: $MLFLOW_TRACKING_URI or the nearest mlflow.db)")
    parser.add_argument("--experiment", help="experiment to open (default: the one with the newest run)")
    parser.add_argument("--comparison", help=f"show only this comparison's runs; '{LATEST}' for the newest one")
    parser.add_argument("--port", type=_port, default=5000, help="first port to try (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the links, and serves them until Ctrl-C unless the store is a server already.

    Raises:
        UserInputError: If the store, the experiment or the comparison is not there, or no port is free.
    """
    from analysis.runs import locate_store
    from lightning_modules.tracking.store import check_store, mlflow_client, redacted

    uri = locate_store(args.tracking_uri)
    check_store(uri)
    client = mlflow_client(uri)
    experiment_id, experiment = _find_experiment(client, redacted(uri), args.experiment)
    pages = _pages(client, experiment_id, experiment, args.comparison)
    if uri.startswith(("http://", "https://")):
        _print_links(f"{redacted(uri).rstrip('/')}/", pages)
        return 0

    port = _free_port(args.port)
    if port != args.port:
        print(f"port {args.port} is in use, taking {port}", file=sys.stderr)
    return _serve(uri, port, pages)


def ui_command(tracking_uri: str, experiment: str, comparison: str | None = None) -> str:
    """What to type here to see these runs, ready for a shell."""
    from lightning_modules.tracking.store import redacted, resolve_tracking_uri

    words = [*_program(), "ui"]
    if tracking_uri != resolve_tracking_uri():
        words += ["--tracking-uri", redacted(tracking_uri)]
    words += ["--experiment", experiment]
    if comparison is not None:
        words += ["--comparison", comparison]
    return shlex.join(words)


def _program() -> list[str]:
    """How to call this program from here; after ``make``, the environment is not activated."""
    beside = Path(sys.executable).parent / "dtr-lab"
    found = shutil.which("dtr-lab")
    if found and Path(found).samefile(beside):
        return ["dtr-lab"]
    if beside.is_file():
        return [os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)]
    return [sys.executable, "-m", "experiments"]


def _find_experiment(client: MlflowClient, store: str, name: str | None) -> tuple[str, str]:
    """Id and name of the experiment asked for, or of the one with the newest run."""
    experiments = {found.experiment_id: found.name for found in client.search_experiments()}
    if name is not None:
        for experiment_id, known in experiments.items():
            if known == name:
                return experiment_id, name
        raise UserInputError(f"no experiment {name!r} in {store}; there are: {', '.join(experiments.values())}")
    newest = client.search_runs(list(experiments), order_by=["attributes.start_time DESC"], max_results=1)
    if not newest:
        raise UserInputError(f"{store} holds no runs yet: make some with `dtr-lab demo` or `dtr-lab train`")
    experiment_id = newest[0].info.experiment_id
    return experiment_id, experiments[experiment_id]


def _pages(client: MlflowClient, experiment_id: str, experiment: str, comparison: str | None) -> dict[str, str]:
    """Links without their base, by what they show."""
    from analysis.reading.store import logged_runs

    runs = logged_runs(client, experiment_id)[::-1]  # the newest first
    known = list(dict.fromkeys(tag for run in runs if (tag := run.data.tags.get(TAG_COMPARISON))))
    if comparison == LATEST and known:
        comparison = known[0]
    if comparison is not None and comparison not in known:
        raise UserInputError(
            f"no comparison {comparison!r} in experiment {experiment!r}; there are: {', '.join(known) or 'none'}"
        )
    members = [run for run in runs if comparison is None or run.data.tags.get(TAG_COMPARISON) == comparison]
    trained = [run.info.run_id for run in members if run.data.tags.get(TAG_KIND) == KIND_TRAINING]
    view = _view(client, experiment_id, comparison, trained)
    pages = {
        "runs": runs_url("", experiment_id, comparison, view=view),
        "charts": runs_url("", experiment_id, comparison, view=view, charts=True),
    }
    parents = [run for run in members if run.data.tags.get(TAG_KIND) == KIND_COMPARISON]
    for parent in parents:  # the newest first
        if any(file.path == REPORT for file in client.list_artifacts(parent.info.run_id)):
            pages["report"] = artifact_url("", experiment_id, parent.info.run_id, REPORT)
            break
    return pages


def _view(client: MlflowClient, experiment_id: str, comparison: str | None, trained: list[str]) -> str | None:
    """Key of the saved view; None, so a plainer page, where we may only read."""
    from mlflow.exceptions import MlflowException

    try:
        return save_view(client, experiment_id, comparison, trained)
    except MlflowException as error:
        print(f"no saved view in MLflow, this store does not take one: {error}", file=sys.stderr)
        return None


def _print_links(entrance: str, pages: dict[str, str]) -> None:
    for what, page in pages.items():
        print(f"  {what:8}{entrance}{page}", flush=True)


def _serve(uri: str, port: int, pages: dict[str, str]) -> int:
    """Runs MLflow's server until it ends or a signal comes; 0 if it was asked to stop."""
    signal.signal(signal.SIGTERM, _interrupt)
    base_url = f"http://{HOST}:{port}"
    print("starting MLflow …", flush=True)
    with tempfile.TemporaryFile() as log:
        process = _start_server(uri, port, log)
        try:
            if _wait_until_ready(process, base_url):
                print("MLflow is ready, Ctrl-C ends it:", flush=True)
                _print_links(f"{base_url}{START}", pages)
                process.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            _stop(process)
        log.seek(0)
        tail = b"\n".join(log.read().splitlines()[-_LOG_LINES:]).decode(errors="replace")
        print(f"MLflow's server ended with code {process.returncode}:\n{tail}", file=sys.stderr)
        return 1


def _start_server(uri: str, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """One worker and no job execution: 2 processes and 0.4 GB instead of 15 and 1.7 GB."""
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not on the command line, where other users would see its password
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--app-name", APP, "--uvicorn-opts", "--log-level=warning"]
    # A session of its own, so that Ctrl-C reaches only us and we end the server together with its worker.
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )


def _wait_until_ready(process: subprocess.Popen[bytes], base_url: str) -> bool:
    """True once the server answers; False if it ended instead."""
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{base_url}/health", timeout=5):
                return True
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserInputError(f"MLflow's server does not answer at {base_url}: {error}") from error
            time.sleep(0.1)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and its worker, politely first."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
            deadline = time.monotonic() + _STOP_SECONDS
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)  # raises once the last of them is gone
                time.sleep(0.05)
        except ProcessLookupError:
            return


def _interrupt(signal_number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not between 1 and 65535")
    return port


def _free_port(first: int) -> int:
    for port in range(first, min(first + _PORTS_TRIED, 65536)):
        with socket.socket() as candidate:
            # Ports of connections that just ended count as free, as they do for the server.
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind((HOST, port))
            except OSError:
                continue
            return port
    raise UserInputError(f"no free port from {first} on: choose another with --port")
