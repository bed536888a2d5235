"""Tests for ``lightning_modules/tracking/logger.py`` and ``callback.py`` inside a real Trainer."""

import copy
import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_modules.errors import UserInputError
from lightning_modules.tracking import outbox
from lightning_modules.tracking.callback import RunTracking, tracking_state, writer_of
from lightning_modules.tracking.logger import TrackingLogger

from .support import artifacts, history
from .training import Probe, Toy, data, trainer


@pytest.fixture
def logger(store, tmp_path, hasty):
    return TrackingLogger(store, experiment="toy", run_dir=str(tmp_path / "runs"))


@pytest.fixture
def fit(logger, tmp_path):
    def run(model=None, *, steps=6, callbacks=(), loader=None, logger=logger, ckpt_path=None, **options):
        made = trainer(logger, tmp_path, steps, [RunTracking(every_n_steps=2), *callbacks], **options)
        made.fit(model or Toy(), loader or data(), ckpt_path=ckpt_path)
        return made

    return run


def all_runs(client):
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def test_ctrl_c_while_the_run_is_created_ends_it(logger, client, fit, monkeypatch):
    from mlflow import MlflowClient

    create_run = MlflowClient.create_run

    def interrupted(self, *args, **kwargs):
        run = create_run(self, *args, **kwargs)
        signal.raise_signal(signal.SIGINT)  # the store has the run, and nobody here knows its id yet
        return run

    monkeypatch.setattr(MlflowClient, "create_run", interrupted)
    with pytest.raises(SystemExit):
        fit()
    assert [run.info.status for run in all_runs(client)] == ["KILLED"]


def test_a_training_becomes_a_run(store, client, tmp_path, hasty):
    parent = client.create_run("0").info.run_id
    logger = TrackingLogger(
        store,
        "toy",
        "first",
        comparison="plain or routed",
        parent_run_id=parent,
        run_dir=str(tmp_path / "runs"),
        tags={"x": "1"},
    )
    made = trainer(logger, tmp_path, 6, [RunTracking(every_n_steps=2, config="a: 1\n"), Probe()])
    made.fit(Toy(), data())
    run = client.get_run(logger.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params == {"width": "3"}
    expected = {
        "x": "1",
        "dtr.comparison": "plain or routed",
        "dtr.kind": "training",
        "dtr.parameters": "4",
        "dtr.attempt": "1",
        "mlflow.parentRunId": parent,
        "mlflow.runName": "first",
    }
    assert expected.items() <= run.data.tags.items()
    assert {"mlflow.user", "mlflow.source.name"} <= set(run.data.tags)
    if (Path(__file__).parents[3] / ".git").exists():
        assert run.data.tags["dtr.git_commit"].startswith(run.data.tags["mlflow.source.git.commit"])
    assert artifacts(client, logger.run_id)["config.yaml"] == b"a: 1\n"
    assert history(client, logger.run_id, "optim/learning_rate") == [(2, 0.1), (4, 0.1), (6, 0.1)]
    assert [step for step, speed in history(client, logger.run_id, "speed/steps_per_second") if speed > 0] == [2, 4, 6]
    assert "epoch" not in run.data.metrics


def test_checkpoints_lie_with_the_run_and_name_it(fit, logger, tmp_path):
    made = fit()
    path = Path(made.checkpoint_callback.best_model_path)
    assert path.parent == tmp_path / "runs" / logger.run_id / "checkpoints"
    assert sorted(entry.name for entry in (tmp_path / "runs").iterdir()) == [logger.run_id]
    state = tracking_state(path)
    assert (state.run_id, state.attempt, state.step) == (logger.run_id, 1, 6)


def test_a_folder_chosen_by_the_user_stays(fit, tmp_path):
    fit(callbacks=[ModelCheckpoint(dirpath=tmp_path / "mine")])
    assert list((tmp_path / "mine").glob("*.ckpt"))


class Broken(Toy):
    """Fails in one of the hooks before training."""

    def __init__(self, hook):
        super().__init__()
        setattr(self, hook, self.fail)

    def fail(self, *args, **kwargs):
        raise ValueError("broken")


@pytest.mark.parametrize(
    "hook", ["prepare_data", "setup", "configure_model", "configure_optimizers", "validation_step"]
)
def test_what_fails_before_training_leaves_no_run(logger, client, tmp_path, hook):
    validation = {"val_dataloaders": data()} if hook == "validation_step" else {}
    made = trainer(logger, tmp_path, 6, [RunTracking()])
    with pytest.raises(ValueError, match="broken"):
        made.fit(Broken(hook), data(), **validation)
    assert all_runs(client) == []
    assert not (tmp_path / "runs").exists()


def stop():
    signal.raise_signal(signal.SIGINT)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def fail():
    raise RuntimeError("diverged")


@pytest.mark.parametrize(
    ("action", "raised", "status"),
    [(stop, SystemExit, "KILLED"), (terminate, SIGTERMException, "KILLED"), (fail, RuntimeError, "FAILED")],
)
def test_the_end_is_told_as_it_was(fit, client, logger, action, raised, status):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(raised):
            fit(Toy(at_step={4: action}), callbacks=[Probe()], steps=30)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    run = client.get_run(logger.run_id)
    assert run.info.status == status
    assert [step for step, _ in history(client, logger.run_id, "loss/train")][:4] == [1, 2, 3, 4]


class Last(Callback):
    """Hands something over at the last moment, and notes what is on disk when the checkpoint is written."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        writer_of(trainer).log_metrics({"late": 1.0}, trainer.global_step)


def test_measurements_reach_the_disk_before_the_checkpoint(fit, logger, monkeypatch):
    monkeypatch.setattr(outbox, "_FLUSH_SECONDS", 30.0)  # so that nothing but a commit writes
    seen = []

    class Recording(ModelCheckpoint):
        def _save_checkpoint(self, made, filepath):
            committed.clear()
            super()._save_checkpoint(made, filepath)
            seen.append(list(committed))

    committed = []
    original = RunTracking.on_save_checkpoint

    def watched(self, made, module, checkpoint):
        put = logger.writer._spool.put
        monkeypatch.setattr(logger.writer._spool, "put", lambda item: committed.append(item) or put(item))
        original(self, made, module, checkpoint)
        monkeypatch.setattr(logger.writer._spool, "put", put)

    monkeypatch.setattr(RunTracking, "on_save_checkpoint", watched)
    fit(callbacks=[Last(), Probe(), Recording(every_n_train_steps=3, save_top_k=-1)])
    assert len(seen) >= 2
    for items in seen[:2]:
        keys = [point[0] for item in items if item.kind == "batch" for point in item.header["metrics"]]
        assert "late" in keys
        assert any(item.kind == "rows" for item in items)


def test_resuming_another_run_than_the_checkpoints_is_refused(fit, client, logger, store, tmp_path):
    path = fit().checkpoint_callback.best_model_path
    other = client.create_run("0").info.run_id
    wrong = TrackingLogger(store, run_dir=str(tmp_path / "runs"), run_id=other)
    with pytest.raises(UserInputError, match=f"belongs to run {logger.run_id}"):
        fit(logger=wrong, ckpt_path=path, steps=8)
    assert "dtr.attempt" not in client.get_run(other).data.tags


def test_a_new_run_from_a_checkpoint_says_where_it_comes_from(fit, client, logger, store, tmp_path):
    path = fit().checkpoint_callback.best_model_path
    fork = TrackingLogger(store, "toy", run_dir=str(tmp_path / "runs"))
    fit(logger=fork, ckpt_path=path, steps=8)
    tags = client.get_run(fork.run_id).data.tags
    assert fork.run_id != logger.run_id
    assert (tags["dtr.continues_run"], tags["dtr.resumed_from"], tags["dtr.attempt"]) == (logger.run_id, "6", "1")


def test_checkpoints_that_name_no_run(tmp_path):
    with pytest.raises(UserInputError, match="there is no checkpoint"):
        tracking_state(tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(UserInputError, match="cannot be read"):
        tracking_state(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    with pytest.raises(UserInputError, match="names no run"):
        tracking_state(tmp_path / "plain.ckpt")


def test_validating_after_training_continues_the_run(fit, client, logger):
    class Validated(Toy):
        def validation_step(self, batch, batch_idx):
            self.log("loss/val", 2.0)

    made = fit(Validated())
    assert client.get_run(logger.run_id).info.status == "FINISHED"
    made.validate(Validated(), data())
    assert [value for _, value in history(client, logger.run_id, "loss/val")] == [2.0]
    assert client.get_run(logger.run_id).info.status == "FINISHED"
    assert len(all_runs(client)) == 1


def test_speed_leaves_validation_out(client, logger):
    class Slow(Toy):
        def validation_step(self, batch, batch_idx):
            time.sleep(0.1)

    made = trainer(logger, Path(logger.save_dir), 6, [RunTracking(every_n_steps=2)], val_check_interval=3)
    made.fit(Slow(), data(), data())  # a second per validation, after steps 3 and 6
    speeds = history(client, logger.run_id, "speed/steps_per_second")
    assert [step for step, _ in speeds] == [2, 4, 6]
    assert min(speed for _, speed in speeds) > 5


def test_copies_share_the_run_and_pickles_leave_the_threads_behind(logger):
    writer = logger.writer
    assert copy.deepcopy(logger).writer is writer
    assert pickle.loads(pickle.dumps(logger)).active_writer is None
    logger.finalize("success")


def test_a_bad_store_fails_at_once(tmp_path):
    with pytest.raises(UserInputError, match="migrate-filestore"):
        TrackingLogger("file:./mlruns")


def test_no_writer_without_a_tracking_logger(fit):
    made = fit(logger=False)
    assert writer_of(made) is None
