"""Links, commands and mistakes of ``dtr-lab ui``; tests/browser drives the pages themselves."""

import shlex
import socket
import sys

import pytest
from mlflow.exceptions import MlflowException

from experiments import ui
from experiments.__main__ import main
from experiments.mlflow_links import artifact_url, runs_url
from lightning_modules.tracking.store import ensure_experiment, mlflow_client
from tests.experiments.test_mlflow_links import fragment_query


def test_ui_command_leaves_out_the_store_that_would_be_found_anyway(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    here = f"sqlite:///{tmp_path}/mlflow.db"
    words = shlex.split(ui.ui_command(here, "digits demo", "demo-1"))
    assert words[-5:] == ["ui", "--experiment", "digits demo", "--comparison", "demo-1"]
    words = shlex.split(ui.ui_command("sqlite:////elsewhere/mlflow.db", "digits", None))
    assert words[-5:] == ["ui", "--tracking-uri", "sqlite:////elsewhere/mlflow.db", "--experiment", "digits"]


def test_ui_command_names_no_password(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "secret" not in ui.ui_command("postgresql://ann:secret@db/mlflow", "digits")


def test_ui_command_can_be_typed_here(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    program = shlex.split(ui.ui_command("sqlite:///x.db", "digits"))[0]
    assert ui.shutil.which(program) or program == sys.executable


def test_a_port_in_use_is_passed_over():
    with socket.socket() as taken:
        taken.bind((ui.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert ui._free_port(port) > port


@pytest.fixture
def store(tmp_path) -> str:
    """A store with an empty experiment ``digits``."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    ensure_experiment(mlflow_client(uri), uri, "digits")
    return uri


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tracking-uri", "sqlite:///nowhere.db"], "no MLflow store at"),
        (["--tracking-uri", "STORE"], "holds no runs yet: make some with `dtr-lab demo`"),
        (["--tracking-uri", "STORE", "--experiment", "digit"], "no experiment 'digit' in sqlite:"),
        (["--tracking-uri", "STORE", "--experiment", "digits", "--comparison", "x"], "no comparison 'x' in experiment"),
        (["--tracking-uri", "STORE", "--experiment", "digits", "--comparison", "latest"], "there are: none"),
    ],
)
def test_a_missing_thing_is_named(store, arguments, message, capsys):
    assert main(["ui", *(store if word == "STORE" else word for word in arguments)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_pages_of_the_latest_comparison(store):
    client = mlflow_client(store)
    experiment_id = client.get_experiment_by_name("digits").experiment_id
    for order, name in enumerate(("old", "new")):
        tags = {"dtr.comparison": name, "dtr.kind": "comparison"}
        run_id = client.create_run(experiment_id, start_time=1000 + order, tags=tags).info.run_id
    pages = ui._pages(client, experiment_id, "digits", "latest")
    assert list(pages) == ["runs", "charts"]  # no report yet, so no link to it
    modes = [fragment_query(page)["compareRunsMode"] for page in pages.values()]
    assert modes == [["TABLE"], ["CHART"]]
    assert fragment_query(pages["runs"])["viewStateShareKey"][0] in str(client.get_experiment(experiment_id).tags)
    client.log_text(run_id, "<p>report</p>", "report.html")
    pages = ui._pages(client, experiment_id, "digits", "new")
    assert pages["report"] == artifact_url("", experiment_id, run_id, "report.html")
    assert run_id in pages["report"]
    of_all = ui._pages(client, experiment_id, "digits", None)
    assert of_all["report"] == pages["report"], "the newest one there is"
    assert fragment_query(of_all["runs"]) != fragment_query(pages["runs"])


def test_a_store_that_takes_no_view_gets_the_plain_link(store, monkeypatch, capsys):
    client = mlflow_client(store)
    experiment_id = client.get_experiment_by_name("digits").experiment_id
    client.create_run(experiment_id, tags={"dtr.comparison": "new"})

    def refuse(*args):
        raise MlflowException("read only")

    monkeypatch.setattr(client, "set_experiment_tag", refuse)
    pages = ui._pages(client, experiment_id, "digits", "new")
    assert pages["runs"] == runs_url("", experiment_id, "new")
    assert "read only" in capsys.readouterr().err


def test_a_store_behind_a_server_is_only_linked_to(monkeypatch, capsys, store):
    client = mlflow_client(store)
    experiment_id = client.get_experiment_by_name("digits").experiment_id
    monkeypatch.setattr("analysis.runs.locate_store", lambda uri: uri)
    monkeypatch.setattr("lightning_modules.tracking.store.check_store", lambda uri: None)
    monkeypatch.setattr("lightning_modules.tracking.store.mlflow_client", lambda uri: client)
    assert main(["ui", "--tracking-uri", "https://ann:secret@lab.example/mlflow", "--experiment", "digits"]) == 0
    printed = capsys.readouterr().out
    assert f"https://lab.example/mlflow/#/experiments/{experiment_id}/runs" in printed
    assert "secret" not in printed
