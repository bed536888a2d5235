"""Tests for `dtr-lab probe` on intervals: what it measures, says and leaves behind."""

import json
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from analysis.gramians import run_gramian
from analysis.reading.telemetry import read_telemetry
from analysis.runs import load_runs
from experiments.probing.data import Batches
from experiments.probing.intervals import IntervalProbe, build_intervals
from experiments.probing.summary import read_measured
from lightning_modules.config import IntervalConfig
from lightning_modules.denoiser import NoisedBatch
from tests.conftest import BACKBONE, UNET
from tests.experiments.probing.helpers import RUN_ID, prepare, run_probe, save_checkpoint


@pytest.fixture
def checkpoint(make_denoiser, tmp_path):
    return save_checkpoint(make_denoiser("dtr"), tmp_path / "last.ckpt")


def gramians_in(folder):
    shards = sorted((folder / "telemetry" / "gradient_gramian").glob("*.parquet"))
    return [pq.read_table(shard).to_pylist() for shard in shards]


def test_the_whole_way_with_tracking(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code = run_probe(checkpoint, tmp_path / "out", "--batches=10", "--verify", f"--tracking-uri={uri}", tracked=True)
    said = capsys.readouterr().out
    assert code == 0
    assert "averaged weights of a DiT" in said
    assert "Conflict rate" in said
    assert "Worst of 16 layers" in said
    assert ": verified." in " ".join(said.split())
    run = read_telemetry(tmp_path / "out" / "telemetry")
    assert dict(run["gramian"].sizes) == {
        "gradient_step": 10,
        "layer": 16,
        "task": 4,
        "half": 2,
        "other_task": 4,
        "other_half": 2,
    }
    blocks = run_gramian(read_measured(tmp_path / "out" / "telemetry", "dtr", 0, "last"), "block")["block"].values
    assert {"blocks.0", "blocks.1", "x_embedder", "final_layer"} <= set(blocks.tolist())
    assert "blocks" not in blocks
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["batches"], summary["stopped"], summary["coverage"], summary["run_id"]) == (
        10,
        "batches",
        1,
        RUN_ID,
    )
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"conflict_matrix.png", "raw_vs_corrected.png", "noise_scale.png"} <= figures

    client = MlflowClient(uri)
    logged = client.search_runs([client.get_experiment_by_name("probe").experiment_id])[0]
    assert logged.info.status == "FINISHED"
    assert logged.data.tags["dtr.kind"] == "probe"
    assert logged.data.tags["dtr.probe.run_id"] == RUN_ID
    assert logged.data.tags["dtr.probe.checkpoint"] == str(checkpoint)
    assert logged.data.tags["dtr.probe.tasks"] == "4 intervals"
    assert logged.data.metrics["conflict/rate"] == pytest.approx(summary["conflict_rate"])
    (tmp_path / "download").mkdir()
    client.download_artifacts(logged.info.run_id, "telemetry", str(tmp_path / "download"))
    assert read_telemetry(tmp_path / "download" / "telemetry").identical(run)
    loaded = load_runs(uri, run_ids=[logged.info.run_id])[0]
    assert loaded["gramian"].equals(run["gramian"])
    assert "intervals.csv" in {item.path for item in client.list_artifacts(logged.info.run_id)}


@pytest.mark.parametrize("backbone", [BACKBONE, UNET], ids=["dit", "unet"])
def test_every_batch_is_what_separate_backward_passes_give(make_denoiser, tmp_path, backbone):
    checkpoint = save_checkpoint(make_denoiser("dtr", backbone=backbone), tmp_path / "last.ckpt")
    args, subject, batches = prepare(checkpoint, "--intervals=3", "--loss-weight=min_snr")
    probe = IntervalProbe(subject, batches, build_intervals(args, subject), args.halves)
    gramian = probe.measure(5)
    batch, group = probe.draw(5)
    module, backbone = subject.module.double(), subject.backbone.double()
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    rows, losses = [], []
    for index in range(6):
        at = torch.nonzero(group == index).squeeze(1)
        part = NoisedBatch(batch.x0[at].double(), batch.y[at], batch.t[at], batch.noise[at].double())
        loss = module.sample_losses(part, backbone).loss.mean()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        losses.append(loss.item())
    expected = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(gramian.total(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
    np.testing.assert_allclose(probe.losses[0], losses, rtol=1e-5)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_one_seed_gives_one_result_and_another_another(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.probing.summary.interval_figures", lambda run: [])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run_probe(checkpoint, tmp_path / name, "--batches=3", f"--seed={seed}") == 0
    first, again, other = (gramians_in(tmp_path / name) for name in "abc")
    assert first == again
    assert first != other


def test_batches_are_independent_and_halves_disjoint(checkpoint):
    args, subject, batches = prepare(checkpoint)
    probe = IntervalProbe(subject, batches, subject.module.intervals, args.halves)
    drawn = [probe.draw(number) for number in (1, 2, 3)]
    images = torch.cat([batch.x0 for batch, _ in drawn]).flatten(1)
    assert len(images.unique(dim=0)) == 96
    assert len(torch.cat([batch.noise for batch, _ in drawn]).flatten(1).unique(dim=0)) == 96
    for batch, group in drawn:
        assert torch.bincount(group, minlength=8).tolist() == [4] * 8
        assert (subject.module.intervals.task_of(batch.t) == group // 2).all()
    dropped = torch.cat([batch.y for batch, _ in drawn]) == subject.backbone.null_class
    assert 0 < dropped.sum() < 30  # a tenth, as in training
    again, _ = IntervalProbe(subject, Batches(subject, batches.data, 32, 0), probe.intervals, 2).draw(2)
    for value, expected in zip(again, drawn[1][0], strict=True):
        assert torch.equal(value, expected)


def test_averaged_weights_unless_asked_for_the_trained_ones(checkpoint):
    totals = []
    for arguments in ([], ["--raw-weights"]):
        args, subject, batches = prepare(checkpoint, *arguments)
        probe = IntervalProbe(subject, batches, subject.module.intervals, args.halves)
        probe.measure(1)
        totals.append(probe.totals[0])
        frozen = {name for name, p in subject.backbone.named_parameters() if not p.requires_grad}
        assert frozen == {"pos_embed"}
    assert not np.allclose(*totals)


@pytest.mark.parametrize(
    ("arguments", "bounds"),
    [
        ([], (0, 250, 500, 750, 1000)),
        (["--intervals=2"], (0, 500, 1000)),
        (["--bounds", "0", "100", "1000"], (0, 100, 1000)),
        (["--spacing=log_snr", "--intervals=2"], None),
    ],
)
def test_intervals_are_the_checkpoints_unless_named(checkpoint, arguments, bounds):
    args, subject, _ = prepare(checkpoint, *arguments)
    if bounds is None:
        bounds = IntervalConfig(2, "log_snr").build(subject.module.diffusion.log_snr).bounds
    assert build_intervals(args, subject).bounds == bounds


def test_the_precision_asked_for_ends_the_measurement(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.probing.summary.interval_figures", lambda run: [])
    arguments = ["--batches=40", "--batch-size=128", "--intervals=2", "--precision=0.5"]
    assert run_probe(checkpoint, tmp_path / "out", *arguments) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["stopped"] == "precision"
    assert 8 <= summary["batches"] < 40
    assert summary["batches"] % 4 == 0
    assert summary["largest_standard_error"] <= 0.5
    assert "precision of 0.5" in capsys.readouterr().out


def test_a_cosine_defined_by_chance_is_no_precision(checkpoint, monkeypatch):
    args, subject, batches = prepare(checkpoint)
    probe = IntervalProbe(subject, batches, subject.module.intervals, args.halves)
    assert probe.precision() == np.inf
    for number in range(1, 9):
        probe.measure(number)
    defined = probe.precision()
    assert np.isfinite(defined)
    kept = np.diag([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    probe.totals = [kept @ total @ kept for total in probe.totals]  # one pair of intervals of six has gradients
    assert probe.precision() == np.inf


def test_an_interruption_keeps_what_was_measured(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.probing.summary.interval_figures", lambda run: [])
    measure = IntervalProbe.measure

    def interrupted(self, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(self, number)

    monkeypatch.setattr(IntervalProbe, "measure", interrupted)
    assert run_probe(checkpoint, tmp_path / "out", "--batches=10") == 130
    captured = capsys.readouterr()
    assert "3 batches of 32 samples, interrupted" in captured.out
    assert "finishing this batch" in captured.err
    assert read_telemetry(tmp_path / "out" / "telemetry").sizes["gradient_step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_single_batch_says_that_it_cannot_tell_noise(checkpoint, tmp_path, capsys):
    assert run_probe(checkpoint, tmp_path / "out", "--batches=1", "--precision=0.05") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Precision 0.05 not reached: 6 of 6 cosines undefined" in said
    assert "fewer than two batches" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["pairs_defined"] == 0
    assert summary["largest_standard_error"] is None


def test_images_that_are_used_again_are_owned_up_to(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.probing.summary.interval_figures", lambda run: [])
    assert run_probe(checkpoint, tmp_path / "out", "--batches=4", "--batch-size=1500") == 0
    assert "Each image was used 4 times" in " ".join(capsys.readouterr().out.split())


def test_a_failure_leaves_a_failed_run_with_what_was_measured(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measure = IntervalProbe.measure

    def failing(self, number):
        if number == 3:
            raise RuntimeError("out of memory")
        return measure(self, number)

    monkeypatch.setattr(IntervalProbe, "measure", failing)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(RuntimeError, match="out of memory"):
        run_probe(checkpoint, tmp_path / "out", f"--tracking-uri={uri}", tracked=True)
    client = MlflowClient(uri)
    logged = client.search_runs([client.get_experiment_by_name("probe").experiment_id])[0]
    assert logged.info.status == "FAILED"
    assert read_telemetry(tmp_path / "out" / "telemetry").sizes["gradient_step"] == 2


def test_gramians_of_an_earlier_measurement_are_replaced(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.probing.summary.interval_figures", lambda run: [])
    monkeypatch.setattr("experiments.probing.record._SHARD_BYTES", 1)
    assert run_probe(checkpoint, tmp_path / "out", "--batches=4") == 0
    assert len(gramians_in(tmp_path / "out")) == 4
    assert run_probe(checkpoint, tmp_path / "out", "--batches=2", "--intervals=2") == 0
    assert read_telemetry(tmp_path / "out" / "telemetry")["gramian"].sizes["gradient_step"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batches=0"], "--batches"),
        (["--batch-size=7"], "--batch-size 7"),
        (["--halves=1"], "--halves"),
        (["--precision=-1"], "--precision"),
        (["--minutes=0"], "--minutes"),
        (["--seed=-1"], "--seed"),
        (["--bounds", "0", "500"], "bounds must end at T"),
        (["--bounds", "0", "1000", "--intervals=2"], "--bounds"),
        (["--intervals=2000"], "2000 intervals"),
        (["--check-exact"], "--timesteps"),
        (["--samples=2"], "--samples belongs to --timesteps"),
        (["--timesteps=10", "--verify"], "--verify"),
        (["--device=nonsense"], "--device"),
        (["--num-heads=2"], "--num-heads"),
        (["--data=image_folder"], "--data-path"),
        (["--data-path=x"], "--data-path"),
        (["--batch-size=2000"], "1500 samples"),
    ],
)
def test_bad_arguments_are_refused_before_work_starts(checkpoint, tmp_path, capsys, arguments, says):
    assert run_probe(checkpoint, tmp_path / "out", *arguments) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "telemetry").exists()


def test_an_unusable_store_is_refused_before_work_starts(checkpoint, tmp_path, capsys):
    uri = f"sqlite:///{tmp_path / 'none' / 'mlflow.db'}"
    assert run_probe(checkpoint, tmp_path / "out", f"--tracking-uri={uri}", tracked=True) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
