"""Tests that a measurement which is wrong in some layer says so."""

import dataclasses
import json

import pytest

from experiments.probing.intervals import IntervalProbe
from experiments.probing.timesteps import TimestepProbe, choose_timesteps, projection_of
from lightning_modules.gradients import GramianRecorder
from tests.experiments.probing.helpers import prepare, run_probe, save_checkpoint

WRONG = "blocks.1.mlp.fc1"


@pytest.fixture
def checkpoint(make_denoiser, tmp_path):
    return save_checkpoint(make_denoiser("dtr"), tmp_path / "last.ckpt")


@pytest.fixture
def spoilt(monkeypatch):
    """Makes the recorder err by 5 % in one layer, without knowing."""
    result = GramianRecorder.result

    def wrong_result(self):
        gramian = result(self)
        values = gramian.values.clone()
        values[gramian.layers.index(WRONG)] *= 1.05
        return dataclasses.replace(gramian, values=values)

    monkeypatch.setattr(GramianRecorder, "result", wrong_result)


def share_of(probe):
    sizes = {name: p.numel() for name, p in probe.subject.backbone.named_parameters() if p.requires_grad}
    return 1 - sum(size for name, size in sizes.items() if name.startswith(WRONG)) / sum(sizes.values())


def test_the_first_batch_is_verified_and_wrong_layers_count_as_uncovered(checkpoint, spoilt):
    args, subject, batches = prepare(checkpoint)
    probe = IntervalProbe(subject, batches, subject.module.intervals, args.halves)
    with pytest.warns(UserWarning, match=f"gradients of {WRONG} are measured wrong"):
        first = probe.measure(1)
    second = probe.measure(2)
    assert first.coverage == second.coverage == probe.coverage == pytest.approx(share_of(probe))
    assert probe.uncovered == (f"{WRONG}.weight", f"{WRONG}.bias")


def test_a_right_measurement_is_covered_whole(checkpoint, recwarn):
    args, subject, batches = prepare(checkpoint)
    probe = IntervalProbe(subject, batches, subject.module.intervals, args.halves)
    probe.measure(1)
    assert (probe.coverage, probe.uncovered, probe.wrong) == (1, (), set())
    assert not [warning for warning in recwarn if "measured wrong" in str(warning.message)]


def test_sketches_of_single_timesteps_are_verified_too(checkpoint, spoilt):
    args, subject, batches = prepare(checkpoint, "--timesteps=8")
    probe = TimestepProbe(subject, batches, choose_timesteps(args, subject), 1, projection_of(args, subject), 0)
    with pytest.warns(UserWarning, match=WRONG):
        assert probe.coverage() == pytest.approx(share_of(probe))


def test_verify_names_wrong_layers_and_fails(checkpoint, tmp_path, capsys, spoilt, monkeypatch):
    monkeypatch.setattr("experiments.probing.summary.interval_figures", lambda run: [])
    with pytest.warns(UserWarning, match=WRONG):
        assert run_probe(checkpoint, tmp_path / "out", "--batches=2", "--verify") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"wrong beyond rounding: {WRONG}." in said
    assert "verified." not in said
    assert "parameters only" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["wrong_layers"] == [WRONG]
    assert summary["coverage"] < 1


def test_coverage_is_the_least_of_all_batches(checkpoint, monkeypatch):
    args, subject, batches = prepare(checkpoint)
    probe = IntervalProbe(subject, batches, subject.module.intervals, args.halves)
    result = GramianRecorder.result
    told = {1: (0.7, ("a",)), 2: (0.5, ("a", "b")), 3: (0.9, ("c",))}
    for number, (coverage, uncovered) in told.items():
        monkeypatch.setattr(
            GramianRecorder,
            "result",
            lambda self, c=coverage, u=uncovered: dataclasses.replace(result(self), coverage=c, uncovered=u),
        )
        probe.measure(number)
    assert probe.coverage == 0.5
    assert probe.uncovered == ("a", "b", "c")
