"""Tests for `lightning_modules/denoiser.py`."""

import dataclasses
from typing import get_args

import pytest
import torch

from lightning_modules.config import IntervalConfig, OptimizationConfig
from lightning_modules.denoiser import BaselineModule, NoisedBatch
from lightning_modules.diffusion import DiffusionConfig
from lightning_modules.errors import UserInputError
from lightning_modules.loss_weights import LossWeightConfig
from lightning_modules.routing import unroute
from lightning_modules.samplers import SamplerConfig
from lightning_modules.samplers.config import SamplerName
from tests.conftest import BACKBONE, DIFFUSION, UNET


def test_methods_of_one_seed_share_initialisation_timesteps_and_noise(make_denoiser, batch):
    modules = [make_denoiser(method, awake=False, seed=5) for method in ("baseline", "random", "dtr")]
    assert [module.method for module in modules] == ["baseline", "random", "dtr"]
    plain = modules[0]
    for module in modules[1:]:
        for (name, p), q in zip(plain.state_dict().items(), module.state_dict().values(), strict=True):
            assert torch.equal(p, q), name
        for a, b in zip(plain.draw(batch, 3), module.draw(batch, 3), strict=True):
            assert torch.equal(a, b)
    other = make_denoiser("baseline", awake=False, seed=6)
    assert not torch.equal(plain.backbone.x_embedder.proj.weight, other.backbone.x_embedder.proj.weight)
    assert not torch.equal(plain.draw(batch, 3).noise, other.draw(batch, 3).noise)
    assert not torch.equal(plain.draw(batch, 3).noise, plain.draw(batch, 4).noise)


def test_unets_of_one_seed_share_initialisation_and_noise_with_each_other_and_with_dits(make_denoiser, batch):
    plain, routed = (make_denoiser(method, awake=False, seed=5, backbone=UNET) for method in ("baseline", "dtr"))
    for (name, p), q in zip(plain.state_dict().items(), routed.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    dit = make_denoiser("dtr", awake=False, seed=5)
    for a, b, c in zip(plain.draw(batch, 3), routed.draw(batch, 3), dit.draw(batch, 3), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


def test_a_unet_learns_its_variance_and_is_masked_as_configured(make_denoiser, batch):
    learned = DiffusionConfig(schedule="cosine", variance="learned_range")
    backbone = dataclasses.replace(UNET, learn_sigma=True)
    module = make_denoiser("random", backbone=backbone, diffusion=learned)
    drawn = module.draw(batch, 0)
    losses = module.sample_losses(drawn)
    torch.testing.assert_close(losses.loss, losses.mse + losses.vb)
    module.training_step(batch, 0)["loss"].backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in module.backbone.parameters())
    unroute(module.backbone)
    assert not torch.allclose(module.sample_losses(drawn).mse, losses.mse)
    with pytest.raises(UserInputError, match="learn_sigma"):
        make_denoiser(backbone=backbone)


def test_a_steps_dropout_is_the_same_whenever_it_is_repeated(make_denoiser, batch):
    module = make_denoiser(backbone=dataclasses.replace(UNET, dropout=0.5)).train()
    before = torch.get_rng_state()
    first = module.training_step(batch, 3)["sample_loss"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(module.training_step(batch, 3)["sample_loss"], first)
    with torch.no_grad():
        without = module.eval().sample_losses(module.draw(batch, 3)).loss
    assert not torch.allclose(without, first)


def test_building_a_module_leaves_the_callers_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    BaselineModule(BACKBONE, DIFFUSION)
    assert torch.equal(before, torch.get_rng_state())


def test_the_training_loss_is_the_mean_of_the_weighted_squared_error(make_denoiser, batch):
    module = make_denoiser("dtr", loss_weight=LossWeightConfig(name="min_snr"))
    drawn = module.draw(batch, 0)
    alpha_bar = torch.sigmoid(module.diffusion.log_snr[drawn.t].double())
    x_t = alpha_bar.sqrt()[:, None, None, None] * drawn.x0 + (1 - alpha_bar).sqrt()[:, None, None, None] * drawn.noise
    error = (module.backbone(x_t.float(), drawn.t, drawn.y) - drawn.noise).square().mean((1, 2, 3))
    snr = alpha_bar / (1 - alpha_bar)
    expected = (torch.clamp(5 / snr, max=1) * error).mean()
    outputs = module.training_step(batch, 0)
    assert outputs["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(outputs["mse"], error.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", get_args(SamplerName))
def test_timesteps_can_be_known_before_a_batch_is_drawn(make_denoiser, batch, sampling):
    module = make_denoiser(
        "dtr", intervals=IntervalConfig(bounds=[0, 20, 100, 1000]), sampler=SamplerConfig(name=sampling)
    )
    for batch_idx in (0, 7):
        assert torch.equal(module.draw_timesteps(len(batch[0]), batch_idx), module.draw(batch, batch_idx).t)
    assert not torch.equal(module.draw_timesteps(16, 0), module.draw_timesteps(16, 7))


def test_a_step_hands_out_each_samples_loss_before_importance_weighting(make_denoiser, batch):
    intervals = IntervalConfig(bounds=[0, 20, 100, 1000])
    module = make_denoiser(intervals=intervals, loss_weight=LossWeightConfig(name="min_snr"))
    outputs = module.training_step(batch, 0)
    assert torch.equal(outputs["sample_loss"], module.sample_losses(module.draw(batch, 0)).loss)
    assert not outputs["sample_loss"].requires_grad
    weighted = (outputs["sample_loss"] * module.intervals.importance(outputs["t"])).mean()
    torch.testing.assert_close(weighted, outputs["loss"].detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs["sample_loss"].mean(), outputs["loss"])


def test_unequal_intervals_do_not_change_what_is_minimised(make_denoiser):
    """Stratified sampling over unequal intervals, averaged over many draws, estimates the loss over uniform t."""
    losses = {}
    images = torch.zeros(512, 1, 8, 8)
    for sampling in ("stratified", "uniform"):
        module = make_denoiser(
            intervals=IntervalConfig(bounds=[0, 20, 100, 1000]), sampler=SamplerConfig(name=sampling)
        )
        with torch.no_grad():
            steps = [module.training_step((images, torch.zeros(512).long()), n)["loss"] for n in range(12)]
        losses[sampling] = torch.stack(steps)
    error = torch.stack([v.std() / len(v) ** 0.5 for v in losses.values()]).norm()
    assert (losses["stratified"].mean() - losses["uniform"].mean()).abs() < 4 * error + 1e-6


def test_label_dropout_replaces_its_share_by_the_null_class(make_denoiser):
    module = make_denoiser(backbone=dataclasses.replace(BACKBONE, label_dropout=0.25))
    labels = torch.arange(4000) % 10
    y = module.draw((torch.zeros(4000, 1, 8, 8), labels), 0).y
    dropped = y == module.backbone.null_class
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(y[~dropped], labels[~dropped])


def test_an_unconditional_model_sees_no_labels(make_denoiser, batch):
    module = make_denoiser(backbone=dataclasses.replace(BACKBONE, num_classes=0))
    assert module.draw(batch, 0).y is None
    assert torch.isfinite(module.training_step(batch, 0)["loss"])


def test_validation_measures_the_averaged_weights_on_noise_that_never_changes(make_denoiser, batch):
    module = make_denoiser(seed=1)
    twin = make_denoiser(seed=2)
    twin.load_state_dict(module.state_dict())
    for each in (module, twin):
        with torch.no_grad():
            for parameter in each.backbone.parameters():
                parameter.add_(1.0)  # the average must not notice
        each.on_validation_epoch_start()
        each.validation_step(batch, 0)
    assert torch.equal(module.validation_moments, twin.validation_moments)
    assert module.validation_moments[0, 0].sum() == 16 * module.validation.repeats
    module.validation_step(batch, 1)
    second = module.validation_moments - twin.validation_moments
    assert not torch.equal(second, twin.validation_moments), "another batch has other noise"


def test_learned_variance_adds_the_variational_term(make_denoiser, batch):
    learned = make_denoiser(
        backbone=dataclasses.replace(BACKBONE, learn_sigma=True),
        diffusion=DiffusionConfig(schedule="cosine", variance="learned_range"),
    )
    losses = learned.sample_losses(learned.draw(batch, 0))
    torch.testing.assert_close(losses.loss, losses.mse + losses.vb)
    with pytest.raises(UserInputError, match="learn_sigma"):
        make_denoiser(backbone=dataclasses.replace(BACKBONE, learn_sigma=True))


def test_sample_losses_of_a_part_are_the_parts_losses(make_denoiser, batch):
    module = make_denoiser("dtr").double()
    drawn = module.draw((batch[0].double(), batch[1]), 0)
    whole = module.sample_losses(drawn).loss
    part = module.sample_losses(NoisedBatch(*(field[5:9] for field in drawn))).loss
    torch.testing.assert_close(part, whole[5:9], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backbone", [BACKBONE, UNET])
def test_compilation_leaves_the_checkpoint_keys_alone(make_denoiser, backbone):
    module = make_denoiser("dtr", backbone=backbone, optimization=OptimizationConfig(compile=True))
    keys = list(module.state_dict())
    module.configure_model()
    assert list(module.state_dict()) == keys == list(make_denoiser(backbone=backbone).state_dict())


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_bad_optimization_is_refused_by_name(settings, culprit):
    with pytest.raises(UserInputError, match=culprit):
        OptimizationConfig(**settings)


def test_explicit_bounds_must_reach_the_last_timestep(make_denoiser):
    with pytest.raises(UserInputError, match="end at T = 1000"):
        make_denoiser(intervals=IntervalConfig(bounds=[0, 10]))


def test_a_specialist_trains_on_its_interval_alone_and_is_not_weighted(make_denoiser, batch):
    module = make_denoiser(intervals=IntervalConfig(bounds=[0, 250, 1000], only=1))
    step = module.training_step(batch, 3)
    assert int(step["t"].min()) >= 250
    assert step["t"].equal(module.draw_timesteps(16, 3))
    torch.testing.assert_close(step["loss"].detach(), step["sample_loss"].mean())
    module.on_validation_epoch_start()
    module.validation_step(batch, 0)
    assert (module.validation_moments[0, 0, :250].sum() > 0).item(), "it is validated on all intervals"


@pytest.mark.parametrize("only", [-1, 2])
def test_a_specialist_of_no_interval_is_refused(make_denoiser, only):
    with pytest.raises(UserInputError, match=r"intervals.only must name one of 2 intervals, 0 to 1"):
        make_denoiser(intervals=IntervalConfig(num_intervals=2, only=only))
