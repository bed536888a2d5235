"""Tests for ``lightning_modules/tracking/writer.py`` and the threads behind it, on a real SQLite store."""

import math
import time

import numpy as np
import pytest
from PIL import Image

from lightning_modules.tracking import records

from .support import artifacts, history, images, losses, picture, rows, wait_until


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


def test_images_share_no_memory_with_the_caller(make_writer, client, run_id, tmp_path):
    writer = make_writer()
    image = picture(200)
    with writer._outbox._flush_lock:  # the spooler has not looked yet
        writer.log_image("x", image, 1)
        image[:] = 0
    writer.close()
    (full,) = (tmp_path / "artifacts").rglob("*.png")
    assert (np.asarray(Image.open(full)) == 200).all()


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
