"""Tests for `experiments/sweeping/store.py` and `parent.py`, and for checkpoints that cannot be gone on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from experiments.sweeping.cells import Place
from experiments.sweeping.checking import _Checker
from experiments.sweeping.parent import under_parent
from experiments.sweeping.spec import read_sweep
from experiments.sweeping.store import configuration_of, known_runs, set_aside, up_to_date
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from lightning_modules.tracking.logger import TrackingLogger
from tests.experiments.sweeping.helpers import GRID, written


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Place(f"sqlite:///{tmp_path / 'store.db'}", Path("runs"))


def begun(place: Place, cell: str = "routing=plain", comparison: str | None = "tiny") -> TrackingLogger:
    """A run such as a training begins, with one metric."""
    tags = {records.TAG_CELL: cell, records.TAG_SETTINGS: "abc", records.TAG_SEED: "3"} if cell else None
    logger = TrackingLogger(
        place.uri, "digits", run_name=f"{cell}-seed3", comparison=comparison, run_dir=str(place.run_dir), tags=tags
    )
    logger.log_metrics({"loss/val": 0.5}, step=7)
    return logger


def test_runs_are_found_as_they_are(place):
    sweep = read_sweep(written(GRID))
    assert known_runs(sweep, place.uri) == []
    assert not Path("store.db").exists(), "looking creates nothing"
    for logger in (begun(place), begun(place, comparison="other"), begun(place, cell="")):
        logger.finalize("success")
    running = begun(place, "routing=random")
    plain, random = known_runs(sweep, place.uri)
    assert (plain.cell, plain.seed, plain.identity, plain.status) == ("routing=plain", 3, "abc", "FINISHED")
    assert plain.metrics["loss/val"] == 0.5
    assert (random.cell, random.status) == ("routing=random", "RUNNING")
    assert configuration_of(plain, place.uri) == {}
    with pytest.raises(UserInputError, match="another process is still writing"):
        up_to_date(sweep, place)
    running.finalize("failed")
    assert [run.status for run in up_to_date(sweep, place)] == ["FINISHED", "FAILED"]
    set_aside([random], place.uri)
    assert known_runs(sweep, place.uri) == [plain]
    assert MlflowClient(place.uri).get_run(random.run_id).info.lifecycle_stage == "deleted"


def test_a_run_that_died_is_marked_and_one_elsewhere_is_left_alone(place):
    sweep = read_sweep(written(GRID))
    logger = begun(place)
    logger.writer._spool.release()  # as the system does for a process that was killed
    assert [run.status for run in up_to_date(sweep, place)] == ["KILLED"]
    client = MlflowClient(place.uri)
    experiment = client.get_experiment_by_name("digits").experiment_id
    tags = {records.TAG_COMPARISON: "tiny", records.TAG_CELL: "routing=dtr", records.TAG_SEED: "0"}
    run_id = client.create_run(experiment, run_name="dtr-seed0", tags=tags).info.run_id
    with pytest.raises(
        UserInputError, match=rf"run dtr-seed0 \({run_id}\) is marked as running, but runs holds nothing"
    ):
        up_to_date(sweep, place)


def test_the_parent_says_what_became_of_the_sweep(place):
    sweep = read_sweep(written(GRID))
    client = MlflowClient(place.uri)
    seen = []

    def status() -> str:
        return client.get_run(seen[-1]).info.status

    def work(result):
        def done(inner: Place) -> bool:
            seen.append(inner.parent)
            assert status() == "RUNNING"
            if isinstance(result, BaseException):
                raise result
            return result

        return done

    assert under_parent(sweep, place, work(False)) is False
    assert status() == "FAILED"
    with pytest.raises(KeyboardInterrupt):
        under_parent(sweep, place, work(KeyboardInterrupt()))
    assert status() == "KILLED"
    with pytest.raises(RuntimeError, match="bug"):
        under_parent(sweep, place, work(RuntimeError("bug")))
    assert status() == "FAILED"
    assert under_parent(sweep, place, work(True)) is True
    assert status() == "FINISHED"
    assert len(set(seen)) == 1
    assert [file.path for file in client.list_artifacts(seen[0], "sweep")] == ["sweep/sweep.yaml"]


def test_what_is_no_checkpoint_is_not_gone_on_from(tmp_path):
    check = _Checker()
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut short")
    torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "foreign.ckpt")
    assert check.checkpoint(str(tmp_path / "cut.ckpt")) is None
    assert check.checkpoint(str(tmp_path / "foreign.ckpt")) is None
    assert check.checkpoint(str(tmp_path / "none.ckpt")) is None
