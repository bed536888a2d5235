"""Stores that go away, hang or refuse, and full disks: the training goes on and nothing is lost or doubled."""

import json
import logging
import threading
import time

import pytest
from mlflow.exceptions import MlflowException

from lightning_modules.errors import UserInputError
from lightning_modules.tracking import outbox, records
from lightning_modules.tracking.sync import sync
from lightning_modules.tracking.writer import RunWriter

from .support import Unreliable, artifacts, history, images, losses, picture, rows, wait_until


def test_commit_needs_no_store(make_writer, unreliable):
    unreliable.away = True
    writer = make_writer(unreliable)
    writer.log_metrics({"a": 1.0}, 1)
    writer.log_rows(records.TIMESTEP_LOSS, losses(1))
    writer.log_image("x", picture(), 1)
    writer.commit()
    kinds = sorted(path.suffix for path in writer._spool.pending())
    assert {".batch", ".image", ".rows"} <= set(kinds)
    written = [writer._spool.read(path).header.get("metrics", []) for path in writer._spool.pending()]
    assert [point[0] for points in written for point in points] == ["a"]


def test_training_does_not_wait_for_a_hanging_store(make_writer, client, run_id):
    release = threading.Event()

    class Hanging(Unreliable):
        def __getattr__(self, name):
            release.wait()
            return super().__getattr__(name)

    writer = make_writer(Hanging(client))
    start = time.monotonic()
    for step in range(100):
        writer.log_metrics({"a": 1.0}, step)
    writer.commit()
    assert time.monotonic() - start < 2
    release.set()
    writer.close()
    assert len(history(client, run_id, "a")) == 100


def test_an_outage_costs_one_warning_and_no_data(make_writer, unreliable, client, run_id, caplog):
    writer = make_writer(unreliable)
    writer.log_metrics({"a": 1.0}, 1)
    wait_until(lambda: history(client, run_id, "a"))
    unreliable.away = True
    with caplog.at_level(logging.WARNING, "lightning_modules"):
        for step in range(2, 6):
            writer.log_metrics({"a": 1.0}, step)
            writer.log_image("x", picture(), step)
            writer.commit()
        calls = unreliable.calls
        wait_until(lambda: unreliable.calls > calls + 3)
        outage = [record.getMessage() for record in caplog.records]
        unreliable.away = False
        writer.close()
    assert len(outage) == 1
    assert "training goes on" in outage[0]
    assert "the store is away" in outage[0]
    assert history(client, run_id, "a") == [(step, 1.0) for step in range(1, 6)]
    assert set(images(client, run_id).values()) == {1}
    assert client.get_run(run_id).info.status == "FINISHED"


def test_what_remains_after_close_is_published_by_sync(make_writer, unreliable, client, run_id, caplog):
    unreliable.away = True
    writer = make_writer(unreliable)
    writer.log_metrics({"a": 1.0}, 1)
    writer.log_rows(records.TIMESTEP_LOSS, losses(1))
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "lightning_modules"):
        writer.close("FAILED", timeout=0.3)
    assert time.monotonic() - start < 5
    assert f"dtr-lab sync {writer.directory}" in caplog.text
    assert history(client, run_id, "a") == []
    assert sync(writer.directory) >= 3
    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert history(client, run_id, "a") == [(1, 1.0)]
    assert len(rows(client, run_id, records.TIMESTEP_LOSS)) == 4
    assert sync(writer.directory.parent) == 0  # nothing left, and the folder of all runs will do


def test_sync_refuses_what_it_cannot_do(make_writer, run_id, tmp_path):
    with pytest.raises(UserInputError, match="holds no run"):
        sync(tmp_path)
    writer = make_writer()
    with pytest.raises(UserInputError, match="still writing"):
        sync(writer.directory)
    writer.log_metrics({"a": 1.0}, 1)
    writer.close()
    with pytest.raises(UserInputError, match=f"run {run_id} cannot be published"):
        sync(writer.directory, f"sqlite:///{tmp_path}/other.db")


def test_no_password_is_written_to_disk(client, run_id, tmp_path):
    writer = RunWriter(client, run_id, tmp_path / "runs", "postgresql://me:secret@host/db")
    writer.close()
    owner = json.loads((writer.directory / "spool" / "run.json").read_text())
    assert owner == {"run_id": run_id, "tracking_uri": None, "writes_run": True}


def test_what_mlflow_refuses_blocks_nothing_else(make_writer, unreliable, client, run_id, caplog):
    def refuse(name, arguments):
        if name == "log_artifact" and "bad.txt" in str(arguments):
            return MlflowException.invalid_parameter_value("no such path")
        return None

    unreliable.refuse = refuse
    writer = make_writer(unreliable)
    writer.log_file("bad.txt", "kept")
    writer.log_file("good.txt", "fine")
    with caplog.at_level(logging.WARNING, "lightning_modules"):
        writer.close()
    assert "MLflow refuses" in caplog.text
    assert artifacts(client, run_id)["good.txt"] == b"fine"
    (rejected,) = writer._spool.rejected_directory.iterdir()
    assert rejected.read_bytes().endswith(b"kept")


@pytest.mark.parametrize("after", ["first file", "both files"])
def test_an_image_interrupted_between_its_files_is_not_doubled(
    make_writer, unreliable, client, run_id, after, tmp_path
):
    pending = ["once"]

    def refuse(name, arguments):
        if name == "log_image" and pending:
            pending.clear()
            args, kwargs = arguments
            client.log_image(*args, **kwargs)
            if after == "first file":
                (small,) = (tmp_path / "artifacts").rglob("*.webp")
                small.unlink()
            return ConnectionError("cut off")
        return None

    unreliable.refuse = refuse
    writer = make_writer(unreliable)
    writer.log_image("grid/a", picture(), 5)
    writer.log_image("grid/a", picture(), 6)
    writer.close()
    assert not pending
    assert images(client, run_id) == {("grid~a", step, kind): 1 for step in (5, 6) for kind in ("png", "webp")}


def test_an_unpublished_end_is_forgotten_when_the_run_goes_on(make_writer, unreliable, client, run_id):
    unreliable.away = True
    writer = make_writer(unreliable)
    writer.close("FAILED", timeout=0.1)
    unreliable.away = False
    writer.reopen()
    writer.log_metrics({"a": 1.0}, 1)
    wait_until(lambda: history(client, run_id, "a"))
    assert client.get_run(run_id).info.status == "RUNNING"


def test_a_full_disk_keeps_measurements_for_later(make_writer, client, run_id, monkeypatch, caplog):
    writer = make_writer()
    put = writer._spool.put

    def full(item):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._spool, "put", full)
    with caplog.at_level(logging.WARNING, "lightning_modules"):
        writer.log_metrics({"a": 1.0}, 1)
        with pytest.raises(OSError, match="No space"):
            writer.commit()
        wait_until(lambda: "stays in memory" in caplog.text)
        writer.log_metrics({"a": 1.0}, 2)
    monkeypatch.setattr(writer._spool, "put", put)
    writer.close()
    assert history(client, run_id, "a") == [(1, 1.0), (2, 1.0)]


def test_ctrl_c_in_the_middle_of_a_commit_loses_nothing(make_writer, client, run_id, monkeypatch):
    monkeypatch.setattr(outbox, "_FLUSH_SECONDS", 30.0)  # leaves all to the commit
    writer = make_writer()
    encode = outbox._png

    def interrupted(image):
        monkeypatch.setattr(outbox, "_png", encode)
        raise KeyboardInterrupt

    monkeypatch.setattr(outbox, "_png", interrupted)
    writer.log_metrics({"a": 1.0}, 1)
    writer.log_image("x", picture(), 1)
    writer.log_rows(records.TIMESTEP_LOSS, losses(1))
    with pytest.raises(KeyboardInterrupt):
        writer.commit()
    writer.close("KILLED")
    assert history(client, run_id, "a") == [(1, 1.0)]
    assert images(client, run_id) == {("x", 1, "png"): 1, ("x", 1, "webp"): 1}
    assert len(rows(client, run_id, records.TIMESTEP_LOSS)) == 4
