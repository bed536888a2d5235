"""A run that is killed without warning and resumed: nothing up to the checkpoint is lost, nothing stands twice."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from lightning_modules.tracking.logger import TrackingLogger
from lightning_modules.tracking.sync import sync
from lightning_modules.tracking.writer import RunWriter

from .support import Unreliable, artifacts, history, images, losses, picture, rows

REPOSITORY = Path(__file__).parents[3]


def train(folder, uri, steps, *options):
    command = [sys.executable, "-m", "tests.lightning_modules.tracking.training", str(folder), uri, str(steps)]
    return subprocess.run(
        [*command, *options], cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200, check=False
    ).returncode


def test_killed_and_resumed(tmp_path, store, client):
    assert train(tmp_path, store, 30, "--die-at", "14") == -9
    (checkpoint,) = tmp_path.glob("runs/*/checkpoints/step=12.ckpt")
    run_id = checkpoint.parents[1].name
    assert client.get_run(run_id).info.status == "RUNNING"
    assert train(tmp_path, store, 20, "--resume", str(checkpoint)) == 0

    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["dtr.attempt"], run.data.tags["dtr.resumed_from"]) == ("2", "12")
    assert history(client, run_id, "loss/train") == [(step, step * 1.5) for step in range(1, 21)]
    assert [step for step, _ in history(client, run_id, "optim/learning_rate")] == list(range(2, 21, 2))
    assert images(client, run_id) == {
        ("conflict_cosine", step, kind): 1 for step in range(1, 21) for kind in ("png", "webp")
    }
    assert rows(client, run_id, records.TIMESTEP_LOSS)["step"].tolist() == list(range(1, 21))
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.fixture
def attempt(client, run_id, store, tmp_path, hasty):
    """Makes writers of one run; what they are handed beyond a commit is lost unless they are closed."""

    def make(client=client, **options):
        return RunWriter(client, run_id, tmp_path / "runs", store, **options)

    return make


def hand_over(writer, steps):
    for step in steps:
        writer.log_metrics({"a": float(step)}, step)
        writer.log_image("x", picture(), step)
        writer.log_rows(records.TIMESTEP_LOSS, losses(step))


def assert_once(client, run_id, steps):
    assert history(client, run_id, "a") == [(step, float(step)) for step in steps]
    assert images(client, run_id) == {("x", step, kind): 1 for step in steps for kind in ("png", "webp")}
    assert rows(client, run_id, records.TIMESTEP_LOSS)["step"].tolist() == np.repeat(list(steps), 4).tolist()


@pytest.mark.parametrize("away", [False, True], ids=["published", "left in the spool"])
def test_steps_beyond_the_checkpoint_stand_once(attempt, client, run_id, away):
    first = Unreliable(client)
    writer = attempt(first)
    hand_over(writer, range(1, 6))
    writer.commit()
    first.away = away
    hand_over(writer, range(6, 11))
    writer.log_params({"lr": 0.1})
    writer.close("FAILED", timeout=0.3 if away else 30)
    writer = attempt(attempt=2, resumed_from=7)
    assert client.get_run(run_id).info.status == "RUNNING"
    hand_over(writer, range(8, 14))
    writer.log_params({"lr": 0.2})
    writer.close()
    assert_once(client, run_id, range(1, 14))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}
    assert run.data.tags["dtr.param_drift"] == "attempt 2: lr: 0.1 -> 0.2"


def test_three_attempts_of_which_the_second_goes_back_further(attempt, client, run_id):
    for number, resumed_from, last in ((1, 0, 9), (2, 6, 12), (3, 3, 15)):
        writer = attempt(attempt=number, resumed_from=resumed_from)
        hand_over(writer, range(resumed_from + 1, last + 1))
        writer.close("KILLED")
    assert_once(client, run_id, range(1, 16))


def test_the_count_of_nonfinite_values_goes_on(attempt, client, run_id):
    writer = attempt()
    for step in (1, 2, 3):
        writer.log_metrics({"a": float("nan")}, step)
    writer.close("FAILED")
    writer = attempt(attempt=2, resumed_from=2)
    for step in (3, 4):
        writer.log_metrics({"a": float("nan")}, step)
    writer.close()
    assert history(client, run_id, "health/nonfinite_count") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_leftovers_are_published_without_what_is_measured_again(attempt, client, run_id):
    first = Unreliable(client)
    first.away = True
    writer = attempt(first)
    hand_over(writer, range(1, 11))
    writer.close("FAILED", timeout=0.1)
    attempt(attempt=2, resumed_from=7).close()
    (shard,) = artifacts(client, run_id, "telemetry/timestep_loss").values()
    assert sorted(set(pq.read_table(io.BytesIO(shard))["step"].to_pylist())) == list(range(1, 8))
    assert max(step for _, step, _ in images(client, run_id)) == 7
    assert [step for step, _ in history(client, run_id, "a")] == list(range(1, 8))
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize("kind", ["batch", "image", "rows"])
def test_a_crash_between_publishing_and_deleting_doubles_nothing(attempt, client, run_id, kind):
    sent = {}

    class Copying(Unreliable):
        def __getattr__(self, name):
            sent.update({path: path.read_bytes() for path in writer._spool.pending() if path.suffix == f".{kind}"})
            return super().__getattr__(name)

    gated = Copying(client)
    gated.away = True
    writer = attempt(gated)
    hand_over(writer, [1, 2])
    writer.commit()
    gated.away = False
    writer.close("FAILED")
    path, content = sorted(sent.items())[-1]
    assert not path.exists()
    path.write_bytes(content)  # as if the process had died before it deleted this one
    writer = attempt(attempt=2, resumed_from=2)
    hand_over(writer, [3])
    writer.close()
    assert_once(client, run_id, [1, 2, 3])


def test_sync_ends_a_run_that_died(attempt, client, run_id):
    writer = attempt()
    writer.commit()
    writer._delivery.stop(5)  # a dead process holds no lock
    sync(writer.directory)
    assert client.get_run(run_id).info.status == "KILLED"
    writer.close()


def test_a_run_that_cannot_be_resumed_is_named(store, client, run_id, tmp_path):
    with pytest.raises(UserInputError, match="run nonsense cannot be resumed"):
        _ = TrackingLogger(store, run_id="nonsense", run_dir=str(tmp_path)).writer
    client.delete_run(run_id)
    with pytest.raises(UserInputError, match="was deleted"):
        _ = TrackingLogger(store, run_id=run_id, run_dir=str(tmp_path)).writer
    assert "telemetry" not in artifacts(client, run_id)
