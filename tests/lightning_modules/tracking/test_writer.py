"""Tests for ``lightning_modules/tracking/writer.py`` and the threads behind it, on a real SQLite store."""

import json
import logging
import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from lightning_modules.tracking.sync import sync
from lightning_modules.tracking.writer import RunWriter

from .conftest import artifacts, history, images, rows


def losses(step):
    return {
        "step": step,
        "window_start": step,
        "split": "train",
        "quantity": "mse",
        "timestep": np.arange(4),
        "count": np.ones(4, dtype=int),
        "sum": np.full(4, float(step)),
        "sum_sq": np.ones(4),
    }


def picture(value=0):
    return np.full((300, 400, 3), value, dtype=np.uint8)


class Unreliable:
    """A client whose store goes away, or dislikes some calls."""

    def __init__(self, client):
        self.client = client
        self.away = False
        self.refuse = lambda name, arguments: None
        self.calls = 0

    def __getattr__(self, name):
        method = getattr(self.client, name)

        def call(*args, **kwargs):
            self.calls += 1
            if self.away:
                raise ConnectionError("the store is away\nwith details")
            error = self.refuse(name, (args, kwargs))
            if error is not None:
                raise error
            return method(*args, **kwargs)

        return call


@pytest.fixture
def unreliable(client):
    return Unreliable(client)


@pytest.fixture
def make_writer(client, run_id, store, tmp_path, hasty):
    opened = []

    def make(client=client, **options):
        writer = RunWriter(client, run_id, tmp_path / "runs", store, **options)
        opened.append(writer)
        return writer

    yield make
    for writer in opened:
        writer.close(timeout=0.0)


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_everything_handed_over_is_read_back(make_writer, client, run_id):
    writer = make_writer()
    for step in range(1, 31):
        writer.log_metrics({"loss/train": 1 / step, "optim/grad_norm": step}, step)
        writer.log_rows(records.TIMESTEP_LOSS, losses(step))
        if step % 10 == 0:
            writer.log_image("conflict_cosine", picture(step), step)
    writer.log_file("telemetry/masks.npz", b"\x00masks")
    writer.log_file("config.yaml", "a: ä")
    writer.log_params({"model": {"alpha": 4, "betas": [0.9, 0.99]}})
    writer.set_tags({"dtr.method": "dtr"})
    writer.close("FINISHED")

    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.end_time
    assert history(client, run_id, "loss/train") == [(step, 1 / step) for step in range(1, 31)]
    assert run.data.params == {"model.alpha": "4", "model.betas": "[0.9, 0.99]"}
    assert run.data.tags["dtr.method"] == "dtr"
    assert run.data.tags["dtr.attempt"] == "1"
    assert run.data.tags["mlflow.loggedImages"] == "True"
    files = artifacts(client, run_id)
    assert files["telemetry/masks.npz"] == b"\x00masks"
    assert files["config.yaml"].decode() == "a: ä"
    assert images(client, run_id) == {
        ("conflict_cosine", step, kind): 1 for step in (10, 20, 30) for kind in ("png", "webp")
    }
    table = rows(client, run_id, records.TIMESTEP_LOSS)
    assert table["step"].tolist() == np.repeat(np.arange(1, 31), 4).tolist()
    assert table["sum"].tolist() == table["step"].tolist()
    assert len(artifacts(client, run_id, "telemetry/timestep_loss")) == 1  # buffered into one shard
    assert not writer._spool.pending()


def test_points_carry_the_time_of_measurement(make_writer, unreliable, client, run_id):
    unreliable.away = True
    writer = make_writer(unreliable)
    before = time.time() * 1000 - 1
    writer.log_metrics({"a": 1.0}, 1)
    after = time.time() * 1000
    time.sleep(0.3)
    unreliable.away = False
    writer.close()
    (point,) = client.get_metric_history(run_id, "a")
    assert before <= point.timestamp <= after


def test_published_while_training_goes_on(make_writer, client, run_id):
    writer = make_writer()
    writer.log_metrics({"a": 1.0}, 1)
    wait_until(lambda: history(client, run_id, "a"))
    assert client.get_run(run_id).info.status == "RUNNING"


def test_nonfinite_values_are_counted_not_logged(make_writer, client, run_id):
    writer = make_writer()
    writer.log_metrics({"a": math.nan, "b": math.inf, "c": 1.0}, 1)
    writer.log_metrics({"a": 2.0}, 2)
    writer.log_metrics({"a": -math.inf}, 3)
    writer.close()
    assert history(client, run_id, "a") == [(2, 2.0)]
    assert history(client, run_id, "b") == []
    assert history(client, run_id, "c") == [(1, 1.0)]
    assert history(client, run_id, "health/nonfinite_count") == [(1, 2.0), (3, 3.0)]


def test_bad_input_fails_at_hand_over_and_harms_nothing(make_writer, client, run_id):
    writer = make_writer()
    with pytest.raises(ValueError, match=r"t\(1\)"):
        writer.log_metrics({"t(1)": 1.0}, 1)
    with pytest.raises(ValueError, match="could not convert"):
        writer.log_metrics({"a": "fast"}, 1)
    with pytest.raises(ValueError, match="unknown telemetry table"):
        writer.log_rows("nonsense", {})
    with pytest.raises(ValueError, match=r"\(H, W, 3\)"):
        writer.log_image("a", np.zeros((4, 4)), 1)
    with pytest.raises(ValueError, match="log_image"):
        writer.log_file("images/a.png", b"")
    with pytest.raises(ValueError, match="a=b"):
        writer.set_tags({"a=b": "c"})
    writer.log_metrics({"a": 1.0}, 1)
    writer.close()
    assert history(client, run_id, "a") == [(1, 1.0)]


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
    assert owner == {"run_id": run_id, "tracking_uri": None}


def test_what_mlflow_refuses_blocks_nothing_else(make_writer, unreliable, client, run_id, caplog):
    from mlflow.exceptions import MlflowException

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
def test_an_image_interrupted_between_its_files_is_not_doubled(make_writer, unreliable, client, run_id, after):
    pending = ["once"]

    def refuse(name, arguments):
        if name == "log_image" and pending:
            pending.clear()
            args, kwargs = arguments
            client.log_image(*args, **kwargs)
            if after == "first file":
                folder = client.download_artifacts(run_id, "images")
                (small,) = [path for path in Path(folder).iterdir() if path.suffix == ".webp"]
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


def test_changed_parameters_are_a_tag_not_an_error(make_writer, client, run_id):
    writer = make_writer()
    writer.log_params({"lr": 0.1, "width": 3})
    writer.log_params({"lr": 0.2, "depth": 4})
    writer.close()
    run = client.get_run(run_id)
    assert run.data.params == {"lr": "0.1", "width": "3", "depth": "4"}
    assert run.data.tags["dtr.param_drift"] == "attempt 1: lr: 0.1 -> 0.2"


def test_a_closed_run_can_go_on(make_writer, client, run_id):
    writer = make_writer()
    writer.log_rows(records.TIMESTEP_LOSS, losses(1))
    writer.close()
    with pytest.raises(RuntimeError, match="closed"):
        writer.log_metrics({"a": 1.0}, 1)
    writer.reopen()
    assert client.get_run(run_id).info.status == "RUNNING"
    writer.log_rows(records.TIMESTEP_LOSS, losses(2))
    writer.close()
    assert rows(client, run_id, records.TIMESTEP_LOSS)["step"].tolist() == [1] * 4 + [2] * 4
    assert client.get_run(run_id).info.status == "FINISHED"


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


def test_a_manifest_brings_its_tags_and_words(make_writer, client, run_id):
    manifest = records.RunManifest(
        method="dtr",
        seed=3,
        num_timesteps=1000,
        interval_bounds=[0, 500, 1000],
        interval_spacing="uniform",
        log_snr=[0.0] * 1000,
        target="epsilon",
        loss_weight="uniform",
        batch_size=8,
        block_channels={"blocks.0": 64},
        routing={"alpha": 4.0},
        parameters=12345,
        dataset="digits",
    )
    writer = make_writer()
    writer.log_manifest(manifest)
    writer.close()
    tags = client.get_run(run_id).data.tags
    assert (tags["dtr.method"], tags["dtr.seed"], tags["dtr.dataset"]) == ("dtr", "3", "digits")
    assert tags["dtr.parameters"] == "12345"
    assert "digits, seed 3: 12,345 trainable parameters, 2 timestep intervals" in tags["mlflow.note.content"]
    content = artifacts(client, run_id)[records.MANIFEST_PATH].decode()
    assert records.RunManifest.from_json(content) == manifest
