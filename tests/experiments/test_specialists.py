"""`dtr-lab specialists`: small trainings, one for each interval, found beside the shared run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from analysis.runs import load_runs
from analysis.specialists import negative_transfer_gap
from experiments.__main__ import main
from experiments.compare import compare
from experiments.comparisons import create_comparison
from lightning_modules.tracking.records import RunManifest
from tests.experiments.test_train import CONFIGS, SMALL

SETTINGS = [
    *(text.removeprefix("--") for text in SMALL if "progress" not in text),
    *("model.init_args.intervals.num_intervals=2", "trainer.max_steps=4", "trainer.val_check_interval=4"),
]


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")


def specialists(*arguments: str) -> int:
    return main(["specialists", f"--config={CONFIGS / 'baseline.yaml'}", *arguments, "--set", *SETTINGS])


def test_a_model_for_each_interval_beside_the_shared_one(tmp_path, capsys):
    uri = f"sqlite:///{tmp_path / 'store.db'}"
    parent = create_comparison(uri, experiment="digits", comparison="c")
    shared = [f"--{text}" for text in SETTINGS]
    assert main(["train", f"--config={CONFIGS / 'baseline.yaml'}", *shared, "--tracking.comparison=c",
                 "--progress.style=off"]) == 0  # fmt: skip
    assert specialists("--comparison=c", "--workers=1") == 0
    assert "2 specialists x 1 seeds, in batches of 8 (the shared model: 16)" in capsys.readouterr().out
    client = MlflowClient(uri)
    found = load_runs(experiment="digits", comparison="c", kind="specialist")
    manifests = [RunManifest.from_json(run.attrs["manifest"]) for run in found]
    assert [(manifest.trained_task, manifest.batch_size) for manifest in manifests] == [(0, 8), (1, 8)]
    assert all("gramian" not in run for run in found)
    for run, manifest in zip(found, manifests, strict=True):
        tags = client.get_run(run.attrs["run_id"]).data.tags
        assert (tags["dtr.kind"], tags["mlflow.parentRunId"]) == ("specialist", parent)
        trained = run["train_loss"].sel(quantity="mse", moment="count").sum("train_step").values
        assert (trained > 0).tolist() == [manifest.trained_task == task for task in range(2)]
    (together,) = load_runs(experiment="digits", comparison="c")
    assert np.isfinite(negative_transfer_gap([together], found)["gap"].values).all()
    summary = compare(experiment="digits", comparison="c", out=tmp_path / "report", log=False)
    assert (tmp_path / "report" / "figures" / "negative_transfer.png").stat().st_size > 5000
    assert not any("specialists" in warning for warning in summary.attrs["warnings"])
    client.delete_run(found[0].attrs["run_id"])
    summary = compare(experiment="digits", comparison="c", out=tmp_path / "again", log=False)
    assert not (tmp_path / "again" / "figures" / "negative_transfer.png").exists()
    (said,) = (warning for warning in summary.attrs["warnings"] if "specialists" in warning)
    assert "The specialists of Baseline are left out: no seed has both a shared run" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nowhere.yaml"], "--config nowhere.yaml"),
        (["--seeds", "1", "1"], "--seeds must differ"),
        (["--comparison=unknown"], "belongs to a comparison 'unknown'"),
        (["--set", "steps"], "--set steps: settings are KEY=VALUE"),
        (["--set", "model.init_args.intervals.only=1"], "trains task 1 alone"),
    ],
)
def test_bad_input_is_refused_before_any_training(tmp_path, capsys, arguments, message):
    Path("shared.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"intervals": {"num_intervals": 2}}}}))
    assert main(["specialists", "--config=shared.yaml", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
