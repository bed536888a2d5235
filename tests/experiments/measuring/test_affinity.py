"""`dtr-lab affinity` on small checkpoints: what it measures, says, keeps, and does when the store is away."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from analysis.reading.telemetry import read_telemetry
from analysis.representation import representation_affinity
from analysis.transfer import fine_tuning_affinity, look_ahead_affinity, predicted_look_ahead
from experiments.__main__ import main
from experiments.measuring.measures import probed_timesteps
from lightning_modules.timesteps import TimestepIntervals
from lightning_modules.tracking.publisher import published_images
from lightning_modules.tracking.records import FINE_TUNING, LOOK_AHEAD, REPRESENTATION, TASK_TRANSFER
from tests.experiments.probing.helpers import save_checkpoint
from tests.lightning_modules.test_published import CONFIG, awake

SMALL = (
    *("--batch-size=16", "--repeats=3", "--fine-tuning-repeats=1", "--updates", "1", "3"),
    *("--evaluation-samples=32", "--images=32", "--timesteps=8", "--device=cpu"),
)


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def store(tmp_path):
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def run_id(store):
    client = MlflowClient(store)
    experiment = client.create_experiment("trained")
    return client.create_run(experiment, tags={"dtr.kind": "training"}).info.run_id


@pytest.fixture
def checkpoint(make_denoiser, tmp_path, run_id):
    return save_checkpoint(make_denoiser("dtr"), tmp_path / "last.ckpt", run_id=run_id)


def affinity(*arguments) -> int:
    return main(["affinity", *map(str, arguments), *SMALL])


def shards(client, run_id, table):
    return [file.path for file in client.list_artifacts(run_id, f"telemetry/{table}")]


def test_the_whole_way_into_the_run_of_the_checkpoint(checkpoint, store, run_id, tmp_path, capsys):
    assert affinity(checkpoint) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "raw weights, step 70, 4 intervals; data digits, evaluated on held-out images" in said
    assert "times what gradients predict to first order" in said
    run = read_telemetry(tmp_path / "runs" / "affinity" / run_id / "telemetry")
    assert dict(run["look_ahead_change"].sizes) == {
        "look_ahead_step": 1, "look_ahead_updates": 1, "look_ahead_repeat": 3, "task": 4, "other_task": 4,
    }  # fmt: skip
    assert run["fine_tuning_updates"].values.tolist() == [1, 3]
    for matrix in (look_ahead_affinity(run), predicted_look_ahead(run), fine_tuning_affinity(run, step=70)):
        assert np.isfinite(matrix.values).all()
    assert dict(run["representation_hsic"].sizes)["probed_timestep"] == 8
    assert np.isfinite(representation_affinity(run).values).all()
    client = MlflowClient(store)
    assert client.get_run(run_id).info.status == "RUNNING", "what is measured of a run does not end it"
    assert len(shards(client, run_id, TASK_TRANSFER)) == 2
    assert len(shards(client, run_id, REPRESENTATION)) == 1
    keys = {(key, step) for key, step, _ in published_images(client, run_id)}
    assert keys == {(f"affinity_{measure}", 70) for measure in (LOOK_AHEAD, FINE_TUNING, REPRESENTATION)}
    assert "manifest.json" not in {file.path.split("/")[-1] for file in client.list_artifacts(run_id, "telemetry")}


def test_measuring_again_takes_the_place_of_what_was_measured(checkpoint, store, run_id):
    assert affinity(checkpoint, "--measures", "look_ahead") == 0
    client = MlflowClient(store)
    before = {image.stem for image in published_images(client, run_id).values()}
    assert affinity(checkpoint, "--measures", "look_ahead", "--seed=5") == 0
    assert len(shards(client, run_id, TASK_TRANSFER)) == 1
    after = {image.stem for image in published_images(client, run_id).values()}
    assert len(after) == len(before) == 1
    assert after != before


def test_numbers_repeat_and_follow_the_seed(checkpoint, tmp_path):
    found = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert affinity(checkpoint, "--no-tracking", f"--seed={seed}", f"--out={out}") == 0
        (folder,) = (tmp_path / out).iterdir()
        found.append(read_telemetry(folder / "telemetry"))
    names = ("look_ahead_change", "fine_tuning_change", "representation_hsic")
    assert all(found[0][name].equals(found[1][name]) for name in names)
    assert not any(found[0][name].equals(found[2][name]) for name in names)


def test_progress_as_lines(checkpoint, capsys):
    assert affinity(checkpoint, "--no-tracking", "--progress=lines", "--measures", "look_ahead", "representation") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert lines == [{"step": n, "max_steps": 5, "loss": None} for n in range(1, 6)]


def test_a_store_that_goes_away_loses_nothing(checkpoint, store, run_id, tmp_path, monkeypatch, capsys):
    log_artifact = MlflowClient.log_artifact

    def away(*_, **__):
        raise ConnectionError("the store is away")

    monkeypatch.setattr(MlflowClient, "log_artifact", away)
    assert affinity(checkpoint, "--measures", "look_ahead") == 0
    folder = tmp_path / "runs" / "affinity" / run_id
    assert f"dtr-lab sync {folder.relative_to(tmp_path)}" in " ".join(capsys.readouterr().out.split())
    client = MlflowClient(store)
    assert shards(client, run_id, TASK_TRANSFER) == []
    monkeypatch.setattr(MlflowClient, "log_artifact", log_artifact)
    assert main(["sync", str(folder)]) == 0
    assert len(shards(client, run_id, TASK_TRANSFER)) == 1
    assert client.get_run(run_id).info.status == "RUNNING"


def test_a_published_file_gets_a_run_of_its_own(tmp_path, store):
    path, latents = tmp_path / "DiT.pt", tmp_path / "latents.npz"
    torch.save(awake(CONFIG, 1).state_dict(), path)
    shape = (CONFIG.in_channels, CONFIG.input_size, CONFIG.input_size)
    np.savez(latents, x=np.random.default_rng(0).standard_normal((60, *shape)).astype(np.float32))
    data = ("--data=latents", f"--data-path={latents}", "--intervals=3", "--measures", "look_ahead")
    assert affinity(path, *data) == 0
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("affinity")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["dtr.kind"] == "probe"
    assert {file.path for file in client.list_artifacts(run.info.run_id, "telemetry")} == {
        "telemetry/manifest.json",
        f"telemetry/{TASK_TRANSFER}",
    }


def test_fine_tuning_goes_on_with_the_optimizers_own_state(make_denoiser, tmp_path):
    module = make_denoiser()
    path = save_checkpoint(module, tmp_path / "plain.ckpt", run_id=None)
    contents = torch.load(path, weights_only=True)
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # a state that is told apart: nothing moves
    contents["optimizer_states"] = [optimizer.state_dict()]
    torch.save(contents, path)
    options = ("--no-tracking", "--measures", "fine_tuning")
    assert affinity(path, *options, "--out=own") == 0
    assert affinity(path, *options, "--out=other", "--learning-rate=0.01") == 0
    own, other = (
        pq.read_table(next((tmp_path / out).rglob("fine_tuning*.parquet"))).to_pandas() for out in ("own", "other")
    )
    assert all(not np.any(row) for row in own["change"])
    assert all(np.any(row) for row in other["change"])
    assert set(other["learning_rate"]) == {0.01}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats=0"], "--repeats must be at least 1"),
        (["--images=3"], "--images must be at least 4"),
        (["--updates", "0", "5"], "--updates must be at least 1"),
        (["--learning-rate=-1"], "--learning-rate must be a positive number"),
        (["--intervals=9"], "was trained and measured with 4 intervals"),
        (["--data=latents"], "--data latents needs --data-path"),
        (["--tracking-uri=foo://x"], "foo://x"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(checkpoint, tmp_path, capsys, arguments, message):
    assert main(["affinity", str(checkpoint), *SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_missing_checkpoint_is_named_before_any_is_measured(checkpoint, tmp_path, capsys):
    assert affinity(checkpoint, "nowhere.ckpt") == 2
    assert "no checkpoint at nowhere.ckpt" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_that_the_store_does_not_have_is_refused(make_denoiser, tmp_path, store, run_id, capsys):
    stranger = save_checkpoint(make_denoiser(), tmp_path / "stranger.ckpt", run_id="f" * 32)
    assert affinity(stranger) == 2
    assert "name the store of that run with --tracking-uri" in capsys.readouterr().err


def test_timesteps_are_spread_over_the_intervals():
    assert probed_timesteps(TimestepIntervals.uniform(1000, 4), 8) == [62, 187, 312, 437, 562, 687, 812, 937]
    assert probed_timesteps(TimestepIntervals.explicit([0, 2, 100, 1000]), 12) == [
        0, 1, 14, 38, 63, 87, 212, 437, 662, 887,
    ]  # fmt: skip
