"""Balancing inside of a training: every branch of it does what plain training does with the gradient it is given."""

import pytest
import pytorch_lightning as pl
import torch
from torchjd import aggregation

from lightning_modules.balancing.config import GRADIENT_METHODS, LOSS_METHODS, BalancingConfig
from lightning_modules.config import IntervalConfig, OptimizationConfig
from lightning_modules.errors import UserInputError
from lightning_modules.objective import BALANCING_STREAM
from lightning_modules.probes import task_weight
from lightning_modules.probes.gradient_conflict import GradientConflictProbe
from lightning_modules.probes.task_weight import TaskWeightProbe
from lightning_modules.seeding import seeded_global
from lightning_modules.tracking.records import TABLES, TASK_WEIGHT
from tests.lightning_modules.balancing.problem import training_jacobian
from tests.lightning_modules.probes.checked_probe import CheckedProbe

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
UNEVEN = IntervalConfig(bounds=[0, 100, 300, 600, 1000])


class Spy(pl.Callback):
    """The gradient that the backward pass left, and the one that the optimizer used, step by step."""

    def __init__(self):
        self.before, self.used = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(flat(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.used.append(flat(pl_module))


def flat(module):
    return torch.cat([p.grad.flatten() for p in module.backbone.parameters() if p.grad is not None]).clone()


class Oracle(pl.Callback):
    """PCGrad by TorchJD on the Jacobian of the batch's task losses, one backward pass each."""

    def __init__(self):
        self.expected = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        _, jacobian = training_jacobian(trainer, pl_module, batch, batch_idx)
        with seeded_global(pl_module.seed, BALANCING_STREAM, batch_idx):
            self.expected.append(aggregation.PCGrad()(jacobian) / len(jacobian))


@pytest.mark.parametrize("mode", ["keep", "second_pass"])
def test_the_optimizer_gets_pcgrads_gradient(make_denoiser, fit, mode):
    """Intervals of unequal width: a task's loss includes its share of the training loss."""
    oracle, spy = Oracle(), Spy()
    module = make_denoiser("dtr", intervals=UNEVEN, balancing=BalancingConfig(method="pcgrad", gradients=mode))
    fit(module, oracle, spy, steps=3, precision="64-true")
    for expected, got in zip(oracle.expected, spy.before, strict=True):
        assert (got - expected).abs().max() <= 1e-8 * expected.abs().max()


@pytest.mark.parametrize("method", ["none", *LOSS_METHODS, *GRADIENT_METHODS])
def test_every_method_trains_and_its_average_follows(make_denoiser, fit, method):
    module = make_denoiser(
        balancing=BalancingConfig(method=method), optimization=OptimizationConfig(learning_rate=1e-2, ema_decay=0.5)
    )
    before = [p.clone() for p in module.ema.module.parameters()]
    fit(module, steps=3)
    assert module.ema.n_averaged == 3
    assert all(p.isfinite().all() for p in module.backbone.parameters())
    pairs = zip(before, module.ema.module.parameters(), module.backbone.parameters(), strict=True)
    assert not [p.shape for p, q, trained in pairs if trained.requires_grad and torch.equal(p, q)]


@pytest.mark.parametrize("method", ["pcgrad", "uw", "famo"])
def test_gradients_are_clipped_after_balancing(make_denoiser, fit, method):
    spy, module = Spy(), make_denoiser(balancing=BalancingConfig(method=method))
    fit(module, spy, steps=3, gradient_clip_val=1e-3)
    for before, used in zip(spy.before, spy.used, strict=True):
        assert before.norm() > 2e-3
        torch.testing.assert_close(used, before * 1e-3 / before.norm(), rtol=1e-3, atol=1e-9)


def test_learned_weights_are_not_clipped_and_have_their_own_learning_rate(make_denoiser, fit):
    module = make_denoiser(
        balancing=BalancingConfig(method="uw", learning_rate=0.025),
        optimization=OptimizationConfig(learning_rate=1e-4, warmup_steps=1000, weight_decay=0.1),
    )
    fit(module, steps=1, gradient_clip_val=1e-6)
    (learned,) = module.balancer.parameters()
    torch.testing.assert_close(learned.detach().abs(), torch.full((4,), 0.025), rtol=1e-3, atol=0)


@pytest.mark.parametrize("mode", ["keep", "second_pass"])
def test_accumulated_batches_share_the_weights_of_the_first(make_denoiser, fit, mode):
    weights = []

    class Weights(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            weights.append(pl_module.balancer.weights.clone())

    fit(
        make_denoiser(balancing=BalancingConfig(method="mgda", gradients=mode)),
        Weights(),
        steps=2,
        accumulate_grad_batches=2,
    )
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "mgda", "gradients": "keep"},
        {"method": "mgda", "gradients": "second_pass", "every_n_steps": 3},
        {"method": "uw"},
    ],
    ids=["keep", "kept weights", "losses"],
)
def test_a_probe_shares_the_measurement(make_denoiser, writer, fit, tmp_path, settings, accumulate):
    """It writes what it would write without balancing, and training is what it would be without the probe."""
    config = {"balancing": BalancingConfig(**settings), "intervals": UNEVEN}
    training = {"steps": 4, "batch_size": 24, "precision": "64-true", "accumulate_grad_batches": accumulate}
    probed, alone = make_denoiser(**config), make_denoiser(**config)
    probe = CheckedProbe(tmp_path / "seen", 1e-10, every_n_steps=2, halves=2)  # also that coverage is 1
    fit(probed, probe, **training)
    fit(alone, **training)
    assert (tmp_path / "seen").read_text().split() == ["2", "0", "4", "0"]
    assert (probed.balancer.weights - 1).abs().max() > 0.1
    for (name, p), q in zip(probed.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-11), name
    assert probed.gramian_request is None


@pytest.mark.parametrize("method", ["uw", "dwa", "famo", "gradvac", "nash_mtl", "pcgrad"])
def test_a_resumed_training_is_an_unbroken_one(make_denoiser, fit, tmp_path, method):
    def make():
        config = BalancingConfig(method=method, every_n_steps=2, dwa_window_steps=2)
        return make_denoiser(balancing=config, optimization=OptimizationConfig(learning_rate=1e-2))

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "five.ckpt")

    whole, resumed = make(), make()
    fit(whole, Save(), steps=9)
    fit(resumed, steps=9, ckpt_path=tmp_path / "five.ckpt")
    assert torch.equal(whole.balancer.weights, resumed.balancer.weights)
    for (name, p), q in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_weights_are_written_as_means_over_the_steps_between(make_denoiser, fit, writer, monkeypatch):
    monkeypatch.setattr(task_weight, "writer_of", lambda trainer: writer)
    seen = []

    class Weights(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.balancer.weights.double().clone())

    fit(
        make_denoiser(balancing=BalancingConfig(method="mgda")),
        TaskWeightProbe(),
        Weights(),
        steps=5,
        log_every_n_steps=2,
    )
    rows = [columns for table, columns in writer.rows if table == TASK_WEIGHT]
    assert [(columns["window_start"][0], columns["step"][0]) for columns in rows] == [(0, 2), (2, 4), (4, 5)]
    assert list(rows[0]) == TABLES[TASK_WEIGHT].names
    for columns, window in zip(rows, ([0, 1], [2, 3], [4]), strict=True):
        expected = torch.stack([seen[step] for step in window]).mean(0)
        assert columns["weight"][0] == pytest.approx(expected.tolist())
    assert writer.metrics[0] == (
        2,
        {
            f"balancing/weight_{label}": pytest.approx(value)
            for label, value in zip(("t000-249", "t250-499", "t500-749", "t750-999"), rows[0]["weight"][0], strict=True)
        },
    )


def test_plain_training_writes_no_weights(make_denoiser, fit, writer, monkeypatch):
    monkeypatch.setattr(task_weight, "writer_of", lambda trainer: writer)
    fit(make_denoiser(), TaskWeightProbe(), steps=2, log_every_n_steps=1)
    assert writer.rows == []


def test_a_specialist_has_nothing_to_balance(make_denoiser):
    with pytest.raises(UserInputError, match=r"intervals\.only"):
        make_denoiser(intervals=IntervalConfig(num_intervals=4, only=1), balancing=BalancingConfig(method="uw"))


def test_a_verified_probe_still_warns(make_denoiser, writer, fit, monkeypatch):
    """Samples that influence one another are found when the balancer records, too."""

    def centred(self, drawn, backbone=None):
        losses = plain(self, drawn, backbone)
        return losses._replace(loss=losses.loss / losses.loss.mean())

    module = make_denoiser(balancing=BalancingConfig(method="mgda", gradients="second_pass"))
    plain = type(module).sample_losses
    monkeypatch.setattr(type(module), "sample_losses", centred)
    with pytest.warns(UserWarning, match=r"covers 0\.0% of the parameters"):
        fit(module, GradientConflictProbe(every_n_steps=1), steps=1)
