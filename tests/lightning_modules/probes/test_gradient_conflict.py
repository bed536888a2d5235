"""Tests for `lightning_modules/probes/gradient_conflict.py`."""

import functools

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from lightning_modules.config import IntervalConfig, OptimizationConfig
from lightning_modules.denoiser import NoisedBatch
from lightning_modules.errors import UserInputError
from lightning_modules.probes.gradient_conflict import GradientConflictProbe, task_cosine
from lightning_modules.samplers import SamplerConfig
from lightning_modules.tracking.records import GRADIENT_GRAMIAN, TABLES
from tests.lightning_modules.probes.checked_probe import CheckedProbe


class GradientSpy(pl.Callback):
    """Keeps the gradient that the optimizer is about to use, by layer."""

    def __init__(self) -> None:
        self.norms = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        layers = {}
        for name, p in pl_module.backbone.named_parameters():
            if p.grad is not None:
                layer = name.rpartition(".")[0]
                layers[layer] = layers.get(layer, 0.0) + p.grad.double().square().sum().item()
        self.norms[trainer.global_step + 1] = layers


def test_the_groups_gradients_add_up_to_the_training_steps_own_gradient(make_denoiser, writer, fit):
    """The mean over groups of equal size is the batch's gradient, so the mean of the Gramian is its squared norm."""
    spy = GradientSpy()
    fit(make_denoiser("dtr"), spy, GradientConflictProbe(every_n_steps=2, halves=2), steps=5)
    measured = [columns for table, columns in writer.rows if table == GRADIENT_GRAMIAN]
    assert [columns["step"][0] for columns in measured] == [2, 4]
    for columns in measured:
        assert list(columns) == TABLES[GRADIENT_GRAMIAN].names
        assert columns["group_count"][0] == [2] * 8
        expected = spy.norms[columns["step"][0]]
        got = {layer: np.mean(g) for layer, g in zip(columns["layer"], columns["gramian"], strict=True)}
        assert got.keys() == expected.keys()
        for layer, value in expected.items():
            assert got[layer] == pytest.approx(value, rel=1e-3, abs=1e-9), layer


UNEVEN = IntervalConfig(bounds=[0, 100, 300, 1000])


@pytest.mark.parametrize(
    ("method", "model", "training"),
    [
        ("dtr", {}, {}),
        ("baseline", {"intervals": UNEVEN}, {}),
        ("baseline", {"intervals": IntervalConfig(num_intervals=5), "sampler": SamplerConfig(name="uniform")}, {}),
        ("baseline", {}, {"accumulate_grad_batches": 3}),
        ("dtr", {}, {"gradient_clip_val": 1e-3}),
        ("dtr", {"optimization": OptimizationConfig(compile=True)}, {}),
    ],
    ids=["dtr", "uneven intervals", "uniform sampling", "accumulation", "clipping", "compiled"],
)
def test_what_is_written_equals_gradients_computed_one_by_one(
    make_denoiser, writer, fit, tmp_path, monkeypatch, method, model, training
):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # inductor takes a minute
    probe = CheckedProbe(tmp_path / "seen", 1e-10, every_n_steps=2, halves=2)
    fit(make_denoiser(method, **model), probe, steps=4, batch_size=18, precision="64-true", **training)
    assert (tmp_path / "seen").read_text().split() == ["2", "0", "4", "0"]
    assert [columns["step"][0] for table, columns in writer.rows if table == GRADIENT_GRAMIAN] == [2, 4]


def test_a_measured_step_takes_no_further_pass(make_denoiser, writer, fit):
    passes = []
    module = make_denoiser()
    module.backbone.register_forward_hook(lambda *_: passes.append("forward"))
    module.backbone.final_layer.register_full_backward_hook(lambda *_: passes.append("backward"))
    fit(module, GradientConflictProbe(every_n_steps=1, verify=False), steps=3)
    assert passes == ["forward", "backward"] * 3


def test_the_first_measurement_is_verified(make_denoiser, writer, fit, monkeypatch):
    def centred(self, drawn, backbone=None):
        losses = plain(self, drawn, backbone)
        return losses._replace(loss=losses.loss / losses.loss.mean())

    module = make_denoiser()
    plain = type(module).sample_losses
    fit(module, GradientConflictProbe(every_n_steps=1), steps=2)
    monkeypatch.setattr(type(module), "sample_losses", centred)
    with pytest.warns(UserWarning, match=r"covers 0\.0% of the parameters"):
        fit(module, GradientConflictProbe(every_n_steps=1), steps=2)
    coverage = [columns["coverage"][0] for table, columns in writer.rows if table == GRADIENT_GRAMIAN]
    assert coverage == [1, 1, 0, 0]


def test_two_processes_measure_the_whole_batch_or_each_its_own(make_denoiser, fit, tmp_path):
    probes = [
        CheckedProbe(tmp_path / processes, 1e-10, every_n_steps=every, processes=processes)
        for processes, every in (("global", 2), ("local", 3))
    ]
    settings = {"strategy": "ddp_spawn", "devices": 2, "use_distributed_sampler": False, "precision": "64-true"}
    fit(make_denoiser(), *probes, steps=3, batch_size=16, **settings)
    assert sorted((tmp_path / "global").read_text().splitlines()) == ["2 0", "2 1"]
    assert sorted((tmp_path / "local").read_text().splitlines()) == ["3 0", "3 1"]


def test_recording_stops_with_the_training_that_failed(make_denoiser, fit, monkeypatch):
    probe, module = GradientConflictProbe(every_n_steps=1), make_denoiser()
    monkeypatch.setattr(module, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(module, probe, steps=1)
    assert probe._recorder is None
    assert torch.overrides._get_current_function_mode_stack() == []


def test_measuring_changes_training_by_no_more_than_the_order_of_sums(make_denoiser, writer, fit):
    plain, probed = make_denoiser(), make_denoiser()
    fit(plain, steps=4, precision="64-true")
    fit(probed, GradientConflictProbe(every_n_steps=1), steps=4, precision="64-true")
    assert len(writer.metrics) == 4
    for (name, p), q in zip(plain.state_dict().items(), probed.state_dict().values(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-11), name


def test_scalars_and_heatmap_follow_from_the_gramian(make_denoiser, writer, fit):
    fit(make_denoiser(), GradientConflictProbe(every_n_steps=3), steps=4)
    (_, columns), (step, metrics), (image_step, key, image) = writer.rows[0], writer.metrics[0], writer.images[0]
    total = np.sum([np.reshape(g, (8, 8)) for g in columns["gramian"]], axis=0, dtype=np.float64)
    merged = total.reshape(4, 2, 4, 2).mean((1, 3))
    cosine = merged / np.sqrt(np.outer(np.diag(merged), np.diag(merged)))
    pairs = cosine[np.triu_indices(4, 1)]
    assert step == image_step == 3
    assert metrics["conflict/mean_cosine"] == pytest.approx(pairs.mean())
    assert metrics["conflict/rate"] == pytest.approx((pairs < 0).mean())
    assert key == "conflict_cosine"
    assert image.dtype == np.uint8


def test_heatmaps_are_thinned_out_over_a_long_run(make_denoiser, writer, fit):
    fit(make_denoiser(), GradientConflictProbe(every_n_steps=1, max_heatmaps=3), steps=9)
    assert [step for step, _, _ in writer.images] == [3, 6, 9]
    assert len(writer.metrics) == 9


def test_an_empty_task_has_no_cosine():
    gramian = np.diag([1.0, 1.0, 0.0, 0.0, 4.0, 4.0])
    cosine = task_cosine(gramian, np.array([2, 2, 0, 0, 2, 1]), 2)
    assert np.isnan(cosine[1]).all()
    assert cosine[0, 0] == pytest.approx(1)
    assert cosine[0, 2] == 0


def test_half_counts_weigh_the_halves_of_a_task():
    vectors = np.random.default_rng(0).normal(size=(4, 5))
    counts = np.array([1, 3, 2, 2])
    tasks = np.stack([(vectors[0] + 3 * vectors[1]) / 4, (vectors[2] + vectors[3]) / 2])
    expected = tasks[0] @ tasks[1] / np.linalg.norm(tasks[0]) / np.linalg.norm(tasks[1])
    assert task_cosine(vectors @ vectors.T, counts, 2)[0, 1] == pytest.approx(expected)


def test_bf16_autocast_agrees_with_float32(make_denoiser, writer, fit, batch):
    for precision in ("32-true", "bf16-mixed"):
        fit(make_denoiser(), GradientConflictProbe(every_n_steps=2), steps=2, precision=precision)
    full, half = (np.sum(columns["gramian"], axis=0) for _, columns in writer.rows)
    assert np.abs(full - half).max() / np.abs(full).max() < 0.05
    assert (full != half).any()


def test_repeating_a_step_repeats_its_batch(make_denoiser, batch):
    module = make_denoiser()
    first, second = module.draw(batch, 7), module.draw(batch, 7)
    assert isinstance(first, NoisedBatch)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_settings_are_refused():
    with pytest.raises(UserInputError, match="halves"):
        GradientConflictProbe(halves=0)
