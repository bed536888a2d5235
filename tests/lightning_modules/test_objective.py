"""Samplers and learned weights inside of a training step; what they are by themselves is tested beside them."""

import pytest
import pytorch_lightning as pl
import torch

from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.config import IntervalConfig, OptimizationConfig
from lightning_modules.loss_weights import LossWeightConfig, timestep_weights
from lightning_modules.masks import MaskConfig
from lightning_modules.method_tag import method_tag
from lightning_modules.probes.gradient_conflict import GradientConflictProbe
from lightning_modules.samplers import SamplerConfig
from tests.conftest import DIFFUSION
from tests.lightning_modules.probes.checked_probe import CheckedProbe

UNEVEN = IntervalConfig(bounds=[0, 100, 300, 1000])


def informed(make_denoiser, name):
    """A module whose sampler has learned a distribution that is not uniform."""
    module = make_denoiser(intervals=UNEVEN, sampler=SamplerConfig(name=name, loss_second_moment_history=1))
    t = torch.arange(1000)
    module.sampler.observe_losses(t, 0.2 + t / 400)
    size = torch.tensor([1.0, 1.0, 9.0, 9.0, 2.0, 2.0], dtype=torch.float64)
    module.sampler.observe_gradients(torch.diag(size), torch.full((6,), 4), 2)
    return module


@pytest.mark.parametrize("name", ["loss_second_moment", "gradient_noise"])
def test_importance_sampling_does_not_change_what_is_minimised(make_denoiser, name):
    module, plain = informed(make_denoiser, name), make_denoiser(intervals=UNEVEN)
    images = (torch.zeros(512, 1, 8, 8), torch.zeros(512).long())
    for each in (module, plain):
        with torch.no_grad():
            each.steps = torch.stack([each.training_step(images, n)["loss"] for n in range(12)])
    assert (module.sampler.importance(torch.arange(1000)) - 1).abs().max() > 0.2
    error = torch.stack([each.steps.std() / 12**0.5 for each in (module, plain)]).norm()
    assert (module.steps.mean() - plain.steps.mean()).abs() < 4 * error + 1e-6


@pytest.mark.parametrize("name", ["log_normal", "speed"])
def test_samplers_that_change_the_objective_are_not_weighted(make_denoiser, batch, name):
    module = make_denoiser(intervals=UNEVEN, sampler=SamplerConfig(name=name))
    outputs = module.training_step(batch, 0)
    torch.testing.assert_close(outputs["loss"].detach(), outputs["sample_loss"].mean())


def test_a_specialist_draws_from_its_interval_whatever_the_sampler(make_denoiser, batch):
    module = make_denoiser(intervals=IntervalConfig(bounds=[0, 100, 300, 1000], only=1), sampler=SamplerConfig("speed"))
    t = module.draw(batch, 0).t
    assert ((t >= 100) & (t < 300)).all()
    assert module.importance(t) == 1


def test_what_a_probe_measures_is_free_of_the_samplers_weights(make_denoiser):
    """A timestep that is drawn twice as often counts half, so a task's mean is that over its uniform timesteps."""
    module = informed(make_denoiser, "loss_second_moment")
    t = module.sampler.sample(60_000, torch.Generator().manual_seed(0))
    value = torch.sin(t / 50.0) + t / 1000.0
    losses = type("Losses", (), {"loss": value})
    measured = module.measured_losses(losses, t)
    task = module.intervals.task_of(t)
    for k, (low, high) in enumerate([(0, 100), (100, 300), (300, 1000)]):
        uniform = torch.arange(low, high)
        expected = (torch.sin(uniform / 50.0) + uniform / 1000.0).mean()
        assert measured[task == k].mean().item() == pytest.approx(expected.item(), abs=0.02)


@pytest.mark.parametrize("name", ["gradient_noise", "speed", "uniform"])
def test_the_probe_writes_the_tasks_own_gradients_under_any_sampler(make_denoiser, writer, fit, tmp_path, name):
    """Except where importance differs within a task, the slow way needs no weights at all."""
    module = make_denoiser(intervals=UNEVEN, sampler=SamplerConfig(name=name))
    probe = CheckedProbe(tmp_path / "seen", 1e-6, every_n_steps=1, halves=2)  # importance is in float32
    fit(module, probe, steps=4, batch_size=36, precision="64-true")
    assert (tmp_path / "seen").read_text().split() == ["1", "0", "2", "0", "3", "0", "4", "0"]
    assert module.sampler.is_informed if name == "gradient_noise" else True


def test_the_loss_sampler_learns_from_training(make_denoiser, fit):
    module = make_denoiser(sampler=SamplerConfig(name="loss_second_moment", loss_second_moment_history=1))
    fit(module, steps=16, batch_size=700)
    p = module.sampler.probabilities()
    assert p.sum().item() == pytest.approx(1)
    assert p.max() > 2 * p.min()


@pytest.mark.parametrize("name", ["loss_second_moment", "gradient_noise"])
def test_a_resumed_sampler_is_an_unbroken_one(make_denoiser, fit, tmp_path, name):
    def make():
        config = SamplerConfig(name=name, loss_second_moment_history=1)
        return make_denoiser(sampler=config, loss_weight=LossWeightConfig(name="edm2"))

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    whole, resumed = make(), make()
    fit(whole, GradientConflictProbe(every_n_steps=2), Save(), steps=6, batch_size=400)
    fit(resumed, GradientConflictProbe(every_n_steps=2), steps=6, batch_size=400, ckpt_path=tmp_path / "three.ckpt")
    for (key, p), q in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q), key


def test_speed_weighs_by_timestep(make_denoiser, batch):
    module = make_denoiser(loss_weight=LossWeightConfig(name="speed"))
    drawn = module.draw(batch, 0)
    losses = module.sample_losses(drawn)
    expected = timestep_weights(LossWeightConfig(name="speed"), module.diffusion)[drawn.t] * losses.mse
    torch.testing.assert_close(losses.loss, expected)
    assert expected.max() > 0
    assert DIFFUSION.target == "epsilon"


def test_edm2_weighs_by_what_it_has_learned_and_learns_beside_the_model(make_denoiser, batch):
    """The gradient of error / exp(u) + u, taken apart: the model's with u fixed, and u's with the error fixed."""
    module = make_denoiser(loss_weight=LossWeightConfig(name="edm2"))
    with torch.no_grad():
        module.uncertainty.weight += torch.randn(128, generator=torch.Generator().manual_seed(0))
    module.training_step(batch, 0)["loss"].backward()
    model = [p.grad.clone() for p in module.backbone.parameters() if p.grad is not None]
    own = module.uncertainty.weight.grad.clone()
    module.zero_grad()
    drawn = module.draw(batch, 0)
    mse = module.sample_losses(drawn).mse
    module.uncertainty.loss(mse, module.diffusion.log_snr[drawn.t]).mean().backward()
    torch.testing.assert_close(module.uncertainty.weight.grad, own)
    for expected, got in zip([p.grad for p in module.backbone.parameters() if p.grad is not None], model, strict=True):
        torch.testing.assert_close(got, expected)


def test_edm2_learns_at_its_own_rate_under_a_balancing_method(make_denoiser, fit):
    module = make_denoiser(
        loss_weight=LossWeightConfig(name="edm2", edm2_learning_rate=0.02),
        balancing=BalancingConfig(method="mgda", gradients="keep"),
        optimization=OptimizationConfig(learning_rate=1e-5, weight_decay=0.1),
    )
    fit(module, steps=1, gradient_clip_val=1e-6)
    torch.testing.assert_close(module.uncertainty.weight.detach().abs(), torch.full((128,), 0.02), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("settings", "tag"),
    [
        ({}, "baseline"),
        ({"routing": MaskConfig()}, "dtr"),
        ({"routing": MaskConfig(kind="random", per_block=True)}, "random+per_block"),
        ({"routing": MaskConfig(beta_last=0.5), "balancing": BalancingConfig("upgrad")}, "dtr+depth+upgrad"),
        ({"loss_weight": LossWeightConfig("min_snr"), "balancing": BalancingConfig("uw")}, "baseline+min_snr+uw"),
        (
            {"loss_weight": LossWeightConfig("speed"), "sampler": SamplerConfig("speed")},
            "baseline+speed+speed_sampling",
        ),
        ({"sampler": SamplerConfig("uniform")}, "baseline+uniform_t"),
    ],
)
def test_a_method_is_named_by_what_differs_from_plain_training(settings, tag):
    parts = {
        "routing": None,
        "loss_weight": LossWeightConfig(),
        "balancing": BalancingConfig(),
        "sampler": SamplerConfig(),
        **settings,
    }
    assert method_tag(**parts) == tag
