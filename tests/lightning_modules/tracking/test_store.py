"""Tests for ``lightning_modules/tracking/store.py``."""

import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from lightning_modules.errors import UserInputError
from lightning_modules.tracking.store import (
    check_store,
    ensure_experiment,
    mlflow_client,
    redacted,
    resolve_tracking_uri,
)


def test_argument_before_environment_before_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert resolve_tracking_uri() == "http://there"
    assert resolve_tracking_uri("sqlite:///here.db") == "sqlite:///here.db"


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("uri", "cure"),
    [
        ("mlruns", "migrate-filestore"),
        ("file:///tmp/mlruns", "migrate-filestore"),
        ("ftp://host", "unknown scheme 'ftp'"),
        ("sqlite://", "names no file"),
        ("sqlite:////no/such/folder/mlflow.db", "create it first"),
        ("sqlite:////proc/mlflow.db/x/y.db", "does not exist"),
        ("sqlite:////proc/version", "cannot be written|not an SQLite"),
        ("http://127.0.0.1:{port}", "mlflow server"),
        ("postgresql://me:secret@127.0.0.1:{port}/db", "cannot be reached"),
        ("mysql+nodriver://127.0.0.1:{port}/db", "cannot be reached"),
    ],
)
def test_unusable_stores_are_named_quickly(uri, cure):
    start = time.monotonic()
    with pytest.raises(UserInputError, match=cure) as caught:
        check_store(uri.format(port=closed_port()))
    assert time.monotonic() - start < 5
    assert "secret" not in str(caught.value)


def test_a_server_that_accepts_and_says_nothing_is_given_up(tmp_path):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        start = time.monotonic()
        with pytest.raises(UserInputError, match="no MLflow server answers"):
            check_store(f"http://127.0.0.1:{mute.getsockname()[1]}")
        assert time.monotonic() - start < 5


def test_checking_creates_nothing(tmp_path):
    check_store(f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())
    (tmp_path / "text.db").write_text("this is no database")
    with pytest.raises(UserInputError, match="not an SQLite database"):
        check_store(f"sqlite:///{tmp_path}/text.db")


def test_passwords_are_left_out_of_messages():
    assert redacted("http://me:secret@host:1/a") == "http://host:1/a"
    assert redacted("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_artifacts_lie_beside_the_database_whatever_the_working_directory(store, tmp_path, monkeypatch):
    client = mlflow_client(store)
    monkeypatch.chdir("/")
    experiment = client.get_experiment(ensure_experiment(client, store, "a/b c"))
    assert Path(url2pathname(urlsplit(experiment.artifact_location).path)) == tmp_path / "mlartifacts" / "a_b_c"
    assert ensure_experiment(client, store, "a/b c") == experiment.experiment_id
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(UserInputError, match="mlflow experiments restore"):
        ensure_experiment(client, store, "a/b c")


def test_two_processes_may_set_up_store_and_experiment_at_once(tmp_path):
    script = (
        "import sys; from lightning_modules.tracking.store import *; uri = sys.argv[1];"
        "client = mlflow_client(uri); print('experiment', ensure_experiment(client, uri, 'same'))"
    )
    command = [sys.executable, "-c", script, f"sqlite:///{tmp_path}/new.db"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("experiment ")


def test_losing_the_race_for_an_experiment_is_no_error(store):
    client = mlflow_client(store)

    class Late:
        """Sees no experiment at first, as if the other process created it a moment later."""

        looked = False

        def __getattr__(self, name):
            return getattr(client, name)

        def get_experiment_by_name(self, name):
            if not self.looked:
                self.looked = True
                return None
            return client.get_experiment_by_name(name)

    first = ensure_experiment(client, store, "same")
    assert ensure_experiment(Late(), store, "same") == first
