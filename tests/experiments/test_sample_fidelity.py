"""Tests for `experiments/sample_fidelity.py`, on networks that were never trained: what is drawn, what is logged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from analysis.fidelity import frechet_bias, frechet_distance, kernel_distance, precision_recall
from experiments import sample_fidelity as module
from experiments.sample_fidelity import BIAS, METRICS, TAG_FIDELITY, main, measure_comparison, sample_fidelity
from lightning_modules.checkpoint import load_denoiser
from lightning_modules.data.digits import DigitsData
from lightning_modules.errors import UserInputError
from lightning_modules.run_record import RESUME_KEY
from lightning_modules.sampling import sample
from lightning_modules.tracking import records
from lightning_modules.tracking.callback import CHECKPOINT_KEY


@pytest.fixture
def write_checkpoint(make_denoiser):
    """Writes a checkpoint whose averaged weights are drawn with one seed, the raw ones with another."""

    def write(path, averaged=0, raw=1, **settings):
        denoiser = make_denoiser("dtr", **settings)
        for seed, model in ((averaged, denoiser.ema.module), (raw, denoiser.backbone)):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(std=0.2, generator=generator)
        contents = {"state_dict": denoiser.state_dict(), "hyper_parameters": dict(denoiser.hparams), "global_step": 70}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**contents, RESUME_KEY: {"data": "digits"}, CHECKPOINT_KEY: {"run_id": "abc"}}, path)
        return path

    return write


def digits():
    trained, held_out = DigitsData().load()
    return torch.cat([trained.images, held_out.images]).double().flatten(1).numpy()


def test_the_averaged_weights_are_sampled_and_compared_with_all_digits(write_checkpoint, tmp_path, monkeypatch):
    drawn = []

    def spied(backbone, *arguments, **settings):
        drawn.append(sample(backbone, *arguments, **settings))
        assert settings["steps"] == 50
        assert settings["method"] == "ddim"
        return drawn[-1]

    monkeypatch.setattr("lightning_modules.sampling.sample", spied)
    monkeypatch.setattr(module, "_AT_ONCE", 16)
    found = sample_fidelity(write_checkpoint(tmp_path / "a.ckpt"), samples=40)
    assert [len(piece) for piece in drawn] == [16, 16, 8]
    samples, real = torch.cat(drawn).double().flatten(1).numpy(), digits()
    assert len(real) == 1797
    expected = [frechet_distance(samples, real), kernel_distance(samples, real), *precision_recall(samples, real)]
    np.testing.assert_allclose([found.metrics[name] for name in METRICS], expected, rtol=1e-9)
    assert found.metrics[BIAS] == pytest.approx(frechet_bias(real, 40))
    assert found.step == 70
    assert found.drawn == "40 samples, 50 DDIM steps, seed 0, against 1797 real images"
    raw = sample_fidelity(write_checkpoint(tmp_path / "b.ckpt", raw=5), samples=40)
    assert raw.metrics == found.metrics
    averaged = sample_fidelity(write_checkpoint(tmp_path / "c.ckpt", averaged=5), samples=40)
    assert averaged.metrics != found.metrics


def test_labels_are_shared_out_as_in_the_data_and_the_same_for_every_model(write_checkpoint, tmp_path, monkeypatch):
    asked = []

    def noted(*arguments, y, **settings):
        asked.append(y)
        return torch.zeros(len(y), 1, 8, 8)

    monkeypatch.setattr("lightning_modules.sampling.sample", noted)
    for name in "ab":
        sample_fidelity(write_checkpoint(tmp_path / name, averaged=ord(name)), samples=500)
    first, other = torch.cat(asked).chunk(2)
    assert torch.equal(first, other)
    np.testing.assert_allclose(np.bincount(first, minlength=10) / 500, 0.1, atol=0.05)


def test_samples_that_diverged_are_at_an_infinite_distance(write_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lightning_modules.sampling.sample", lambda *_, y, **__: torch.full((len(y), 1, 8, 8), math.nan)
    )
    found = sample_fidelity(write_checkpoint(tmp_path / "a.ckpt"), samples=10)
    assert [found.metrics[name] for name in METRICS] == [math.inf, math.inf, 0.0, 0.0]


def test_images_too_large_for_measures_of_pixels_are_refused(write_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_PIXELS", 63)
    with pytest.raises(UserInputError, match="64 numbers: measures of pixels are for small images"):
        sample_fidelity(write_checkpoint(tmp_path / "a.ckpt"), samples=10)


@pytest.fixture
def comparison(tmp_path, write_checkpoint):
    """Two finished runs with checkpoints, one without, one that failed, one of another comparison."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("grid", artifact_location=str(tmp_path / "artifacts"))
    ids = {}
    for name, status, own in (
        ("first", "FINISHED", "c"),
        ("second", "FINISHED", "c"),
        ("lost", "FINISHED", "c"),
        ("failed", "FAILED", "c"),
        ("other", "FINISHED", "d"),
    ):
        tags = {records.TAG_KIND: records.KIND_TRAINING, records.TAG_COMPARISON: own}
        ids[name] = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        client.set_terminated(ids[name], status)
        if name != "lost":
            write_checkpoint(tmp_path / "runs" / ids[name] / "checkpoints" / "last.ckpt", averaged=len(ids))
    return uri, client, ids, tmp_path / "runs"


def measure(comparison, samples=20, workers=1):
    uri, _, _, run_dir = comparison
    chosen = {"experiment": "grid", "comparison": "c"}
    return measure_comparison(uri, **chosen, run_dir=run_dir, samples=samples, workers=workers)


def test_finished_runs_are_measured_once(comparison, capsys):
    _, client, ids, run_dir = comparison
    (run_dir / ids["second"] / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    problems = measure(comparison)
    assert len(problems) == 2
    assert f"lost: no checkpoint at {run_dir / ids['lost']}" in " ".join(problems)
    assert any(problem.startswith("second: ") and "last.ckpt" in problem for problem in problems)
    run = client.get_run(ids["first"])
    assert set(run.data.metrics) == {*METRICS, BIAS}
    expected = sample_fidelity(run_dir / ids["first"] / "checkpoints" / "last.ckpt", samples=20)
    assert run.data.metrics == pytest.approx(expected.metrics)
    assert run.data.tags[TAG_FIDELITY] == expected.drawn
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(ids["first"], METRICS[0])] == [70]
    for name in ("failed", "other", "second"):
        assert not client.get_run(ids[name]).data.metrics
    capsys.readouterr()
    measure(comparison)
    assert capsys.readouterr().out.startswith("1 runs to measure")  # the damaged one again
    assert len(client.get_metric_history(ids["first"], METRICS[0])) == 1


def test_another_number_of_samples_is_measured_anew(comparison):
    _, client, ids, _ = comparison
    assert len(measure(comparison, samples=20)) == 1
    assert len(measure(comparison, samples=30, workers=2)) == 1  # in processes of their own
    for name in ("first", "second"):
        assert client.get_run(ids[name]).data.tags[TAG_FIDELITY].startswith("30 samples, ")
    assert len(client.get_metric_history(ids["first"], METRICS[0])) == 2


def test_command_line(comparison, capsys):
    uri, _, _, run_dir = comparison
    arguments = ["--tracking-uri", uri, "--run-dir", str(run_dir), "--comparison", "c"]
    assert main([*arguments, "--experiment", "nothing"]) == 2
    assert "no experiment 'nothing'" in capsys.readouterr().err
    assert main([*arguments, "--experiment", "grid", "--samples", "1"]) == 2
    assert main([*arguments[:-1], "e", "--experiment", "grid"]) == 2
    assert "there are: c, d" in capsys.readouterr().err
    assert main([*arguments, "--experiment", "grid", "--samples", "10", "--workers", "1"]) == 1
    captured = capsys.readouterr()
    assert "first: frechet_pixels" in captured.out
    assert "lost: no checkpoint" in captured.err


def test_a_checkpoint_is_left_as_it_is(write_checkpoint, tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt")
    before = path.read_bytes()
    sample_fidelity(path, samples=10)
    assert path.read_bytes() == before
    load_denoiser(path)
