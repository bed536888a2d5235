"""Tests for `dtr-lab probe --timesteps`: the affinity of single timesteps in bounded memory."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import xarray as xr
from mlflow import MlflowClient

from experiments.probing.timesteps import TimestepProbe, check_exact, choose_timesteps, projection_of
from lightning_modules.denoiser import NoisedBatch
from lightning_modules.gradients.sketch import CountSketch
from tests.conftest import BACKBONE, UNET
from tests.experiments.probing.helpers import prepare, run_probe, save_checkpoint


@pytest.fixture
def checkpoint(make_denoiser, tmp_path):
    return save_checkpoint(make_denoiser("dtr"), tmp_path / "last.ckpt")


def make_probe(checkpoint, *arguments):
    args, subject, batches = prepare(checkpoint, *arguments)
    timesteps = choose_timesteps(args, subject)
    probe = TimestepProbe(subject, batches, timesteps, args.samples, projection_of(args, subject), args.seed)
    return args, probe


def test_every_timestep_is_visited_equally_often_by_both_halves_in_random_order(checkpoint):
    _, probe = make_probe(checkpoint, "--timesteps=12", "--samples=4")
    assert probe.timesteps.tolist()[::11] == [0, 999]
    visits = [probe.visits(number) for number in range(1, 7)]  # 6 batches of 8 are 4 passes over 12
    task, half = torch.cat([task for task, _ in visits]), torch.cat([half for _, half in visits])
    for turn in range(4):
        assert sorted(task[12 * turn : 12 * turn + 12].tolist()) == list(range(12))
        assert set(half[12 * turn : 12 * turn + 12].tolist()) == {turn % 2}
    assert task[:12].tolist() != task[12:24].tolist()
    assert [probe.ends_a_pair_of_passes(number) for number in range(1, 7)] == [False, False, True, False, False, True]


@pytest.mark.parametrize("backbone", [BACKBONE, UNET], ids=["dit", "unet"])
def test_the_exact_affinity_is_that_of_gradients_one_by_one(make_denoiser, tmp_path, backbone):
    checkpoint = save_checkpoint(make_denoiser("dtr", backbone=backbone), tmp_path / "last.ckpt")
    _, probe = make_probe(checkpoint, "--timesteps=8", "--samples=2", "--check-exact")
    for number in (1, 2, 3):
        probe.measure(number)
    module, backbone = probe.subject.module.double(), probe.subject.backbone.double()
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    sums = torch.zeros(2, 8, probe.projection.width, dtype=torch.float64)
    for number in (1, 2, 3):
        task, half = probe.visits(number)
        batch, _ = probe._draw(number, task)
        for group in range(16):
            at = slice(2 * group, 2 * group + 2)
            assert (batch.t[at] == probe.timesteps[task[group]]).all()
            part = NoisedBatch(batch.x0[at].double(), batch.y[at], batch.t[at], batch.noise[at].double())
            loss = module.sample_losses(part, backbone).loss.sum()
            gradients = torch.autograd.grad(loss, parameters)
            sums[half[group], task[group]] += torch.cat([gradient.flatten() for gradient in gradients])
    assert probe.sums.counts.tolist() == [[6] * 8] * 2
    expected = sums / 6
    torch.testing.assert_close(
        probe.sums.means().double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
    )


def test_sketching_each_batch_is_sketching_the_mean_of_all(checkpoint):
    arguments = ["--timesteps=8", "--samples=2", "--sketch-size=64"]
    args, sketched = make_probe(checkpoint, *arguments)
    _, exact = make_probe(checkpoint, *arguments, "--check-exact")
    for probe in (sketched, exact):
        for number in (1, 2):
            probe.measure(number)
    afterwards = exact.affinity(CountSketch(64, args.seed))
    at_once = sketched.affinity()
    for name in ("plain_cosine", "squared_norm", "signal"):
        np.testing.assert_allclose(at_once[name], afterwards[name], rtol=1e-2, atol=1e-4)
    assert sketched.sums.sums.numel() == 2 * 8 * 64  # whatever the size of the network
    assert exact.sums.sums.numel() == 2 * 8 * sum(p.numel() for p in exact.subject.backbone.parameters()) - 2 * 8 * 64


def test_the_error_against_the_exact_matrix_falls_with_the_root_of_the_sketchs_size(checkpoint):
    errors = []
    for seed in range(6):
        args, probe = make_probe(
            checkpoint, "--timesteps=16", "--samples=2", "--check-exact", "--sketch-size=4096", f"--seed={seed}"
        )
        for number in range(1, 9):
            probe.measure(number)
        rows = check_exact(probe, args)
        assert [row["width"] for row in rows] == [64, 256, 1024, 4096]
        errors.append([(row["error"], row["stated"]) for row in rows])
    error, stated = np.sqrt(np.nanmean(np.square(errors), axis=0)).T
    # From D = 256 to 4096 by a factor of 4; the sketch's own statement bounds the error, and not by much.
    assert 2.5 < error[1] / error[3] < 8
    assert (error[1:] < 1.2 * stated[1:]).all()
    assert (error[1:] > 0.25 * stated[1:]).all()


def test_the_whole_way_with_tracking(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    arguments = ["--timesteps=16", "--samples=2", "--sketch-size=512", "--check-exact", f"--tracking-uri={uri}"]
    assert run_probe(checkpoint, tmp_path / "out", *arguments, "--precision=1e-6", tracked=True) == 0
    said = capsys.readouterr().out
    assert "Precision 1e-06 not reached" in said
    assert "Sketched against exact gradients" in said
    assert "8 batches of 32 samples, as asked" in said  # 8 passes over 16 timesteps, 16 in a batch
    found = xr.load_dataset(tmp_path / "out" / "affinity.nc")
    assert found["cosine"].shape == (16, 16)
    assert found["timestep"].values[[0, -1]].tolist() == [0, 999]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["sketch_error"] == pytest.approx(found.attrs["sketch_error"])
    assert summary["timesteps_defined"] == int(found["cosine"].notnull().values.diagonal().sum())
    assert (tmp_path / "out" / "figures" / "timestep_affinity.png").stat().st_size > 10_000
    client = MlflowClient(uri)
    logged = client.search_runs([client.get_experiment_by_name("probe").experiment_id])[0]
    assert logged.data.tags["dtr.probe.tasks"] == "16 timesteps"
    assert logged.data.params["sketch_size"] == "512"
    assert {"affinity.nc", "figures", "images", "summary.json"} <= {
        item.path for item in client.list_artifacts(logged.info.run_id)
    }


def test_an_interruption_leaves_undefined_what_was_not_measured(checkpoint, tmp_path, capsys, monkeypatch):
    measure = TimestepProbe.measure

    def interrupted(self, number):
        os.kill(os.getpid(), signal.SIGINT)
        return measure(self, number)

    monkeypatch.setattr(TimestepProbe, "measure", interrupted)
    assert run_probe(checkpoint, tmp_path / "out", "--timesteps=20", "--sketch-size=64") == 130
    assert "1 batch of 32 samples, interrupted" in capsys.readouterr().out
    found = xr.load_dataset(tmp_path / "out" / "affinity.nc")
    assert np.isfinite(found["signal"]).sum() == 12  # of 32 visits, 20 were of the first half
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert (summary["stopped"], summary["batches"]) == ("interrupted", 1)


def test_one_seed_gives_one_result(checkpoint, tmp_path):
    arguments = ["--timesteps=10", "--samples=2", "--sketch-size=64", "--batches=2"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run_probe(checkpoint, tmp_path / name, *arguments, f"--seed={seed}") == 0
    first, again, other = (xr.load_dataset(tmp_path / name / "affinity.nc") for name in "abc")
    assert first.identical(again)
    assert not first["plain_cosine"].equals(other["plain_cosine"])


def test_the_precision_asked_for_is_looked_at_after_both_halves_had_all_timesteps(checkpoint, tmp_path):
    arguments = ["--timesteps=16", "--samples=2", "--sketch-size=256", "--batches=20", "--precision=0.9"]
    assert run_probe(checkpoint, tmp_path / "out", *arguments) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["stopped"] == "precision"
    assert summary["batches"] % 2 == 0
    assert summary["sampling_error"] <= 0.9


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--timesteps=1"], "--timesteps must lie in 2..1000"),
        (["--timesteps=1001"], "2..1000"),
        (["--timesteps=10", "--intervals=2"], "--intervals"),
        (["--timesteps=10", "--halves=4"], "--halves"),
        (["--timesteps=10", "--samples=3"], "--samples 3"),
        (["--timesteps=100", "--batches=6"], "at least 7"),
        (["--timesteps=10", "--sketch-size=0"], "--sketch-size"),
    ],
)
def test_bad_arguments_are_refused(checkpoint, tmp_path, capsys, arguments, says):
    assert run_probe(checkpoint, tmp_path / "out", *arguments) == 2
    assert says in capsys.readouterr().err


def test_exact_gradients_that_do_not_fit_are_refused(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.probing.timesteps._EXACT_BYTES", 1_000_000)
    assert run_probe(checkpoint, tmp_path / "out", "--timesteps=100", "--check-exact") == 2
    assert "100 gradients" in capsys.readouterr().err
