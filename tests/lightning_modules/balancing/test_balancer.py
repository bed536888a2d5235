"""A balanced step against TorchJD on the full Jacobian, in float64."""

import pytest
import torch

from lightning_modules.balancing.balancer import Request, Situation
from lightning_modules.balancing.build import build_balancer
from lightning_modules.balancing.config import GRADIENT_METHODS, LOSS_METHODS, BalancingConfig
from lightning_modules.errors import UserInputError
from tests.lightning_modules.balancing.problem import (
    ENTROPY,
    TASK,
    UNEVEN,
    K,
    Problem,
    aggregators,
    gradient,
    network,
    torchjd_gradient,
)

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")


def balanced_step(balancer, model, problem, *, scale=1.0, **situation):
    """One step; leaves the gradient in ``.grad``. ``scale`` is a gradient scaler's."""
    model.zero_grad()
    setting = Situation(problem.task, **{"step": 0, "entropy": ENTROPY, "loss_scale": scale, **situation})
    with balancer.watch(model, setting) as to_loss:
        loss = to_loss(problem.losses(model))
    (loss * scale).backward()
    return loss


def make(method, mode="auto", **settings):
    return build_balancer(BalancingConfig(method=method, gradients=mode, **settings), K, 1000)


def test_the_tasks_of_the_problem_conflict():
    jacobian = Problem().jacobian(network())
    gramian = jacobian @ jacobian.T
    assert (gramian < 0).sum() >= 4
    assert (gramian.sum(1) < 0).any(), "the plain step harms a task"


@pytest.mark.parametrize("task", [TASK, UNEVEN], ids=["ordered", "uneven"])
@pytest.mark.parametrize("mode", ["keep", "second_pass"])
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_the_step_is_torchjds_on_the_full_jacobian(method, mode, task):
    model, problem = network(), Problem(task)
    jacobian = problem.jacobian(model)
    if method == "nash_mtl":  # TorchJD's start must be inside its problem's domain, see `_start_inside`
        aggregator, balancer = aggregators()[method], make(method, mode)
        balancer.weighting(jacobian @ jacobian.T)
        aggregator.weighting.prvs_alpha = balancer.weighting.state()["solution"].numpy()
    else:
        aggregator, balancer = None, make(method, mode)
    expected = torchjd_gradient(method, jacobian, aggregator)
    balanced_step(balancer, model, problem)
    assert (gradient(model) - expected).abs().max() <= 1e-8 * expected.abs().max()
    assert (expected - jacobian.mean(0)).abs().max() > 1e-3 * expected.abs().max(), "it must differ from plain training"


@pytest.mark.parametrize("mode", ["keep", "second_pass"])
def test_nash_mtl_is_torchjds_where_its_start_is_inside(mode):
    model, problem = network(), Problem()
    problem.target = problem.target.abs()  # now the tasks agree
    jacobian = problem.jacobian(model)
    assert (jacobian @ jacobian.T).sum(1).min() > 0
    expected = torchjd_gradient("nash_mtl", jacobian)
    balanced_step(make("nash_mtl", mode), model, problem)
    assert (gradient(model) - expected).abs().max() <= 1e-8 * expected.abs().max()


@pytest.mark.parametrize("method", ["gradvac", "nash_mtl"])
def test_methods_with_a_memory_stay_torchjds_over_several_steps(method):
    model, problem, balancer, aggregator = network(), Problem(), make(method), aggregators()[method]
    problem.target = problem.target.abs() if method == "nash_mtl" else problem.target
    for step in range(3):
        expected = torchjd_gradient(method, problem.jacobian(model), aggregator)
        balanced_step(balancer, model, problem, step=step)
        assert (gradient(model) - expected).abs().max() <= 1e-8 * expected.abs().max()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad


@pytest.mark.parametrize("mode", ["keep", "second_pass"])
@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_a_probes_halves_and_a_scaler_change_nothing_but_what_is_measured(mode, scale):
    model, problem = network(), Problem()
    jacobian = problem.jacobian(model)
    balancer = make("pcgrad", mode)
    balanced_step(balancer, model, problem, scale=scale, request=Request(halves=2))
    expected = torchjd_gradient("pcgrad", jacobian)
    assert (gradient(model) / scale - expected).abs().max() <= 1e-8 * expected.abs().max()
    halves = balancer.gramian
    assert halves.coverage == 1
    assert halves.counts.tolist() == [2] * (2 * K)
    torch.testing.assert_close(halves.total().view(K, 2, K, 2).mean((1, 3)), jacobian @ jacobian.T)


@pytest.mark.parametrize("mode", ["keep", "second_pass"])
def test_weights_are_kept_between_updates(mode):
    model, problem, balancer = network(), Problem(), make("upgrad", mode, every_n_steps=3)
    balanced_step(balancer, model, problem)
    weights = balancer.weights.clone()
    problem.target = -problem.target
    for step, first_batch in ((1, True), (2, True), (3, False)):
        balanced_step(balancer, model, problem, step=step, first_batch=first_batch)
        assert balancer.gramian is None
        assert torch.equal(balancer.weights, weights)
        torch.testing.assert_close(gradient(model), weights / K @ problem.jacobian(model))
    balanced_step(balancer, model, problem, step=3)
    assert not torch.equal(balancer.weights, weights)


@pytest.mark.parametrize("mode", ["keep", "second_pass"])
def test_a_batch_without_samples_of_a_task_leaves_the_weights(mode):
    model, problem, balancer = network(), Problem(), make("upgrad", mode)
    balanced_step(balancer, model, problem)
    weights = balancer.weights.clone()
    lacking = Problem(torch.where(TASK == 2, 1, TASK))
    balanced_step(balancer, model, lacking)
    assert torch.equal(balancer.weights, weights)
    torch.testing.assert_close(gradient(model), weights / K @ lacking.jacobian(model))


@pytest.mark.parametrize("mode", ["keep", "second_pass"])
def test_overflow_leaves_the_weights(mode):
    model, problem, balancer = network(), Problem(), make("upgrad", mode)
    problem.target[0] = float("inf")
    balanced_step(balancer, model, problem)
    assert torch.equal(balancer.weights, torch.ones(K))


@pytest.mark.parametrize("mode", ["keep", "second_pass"])
def test_gradients_add_up_to_what_is_in_grad_already(mode):
    model, problem = network(), Problem()
    balanced_step(make("mgda", mode), model, problem)
    once = gradient(model).clone()
    with make("mgda", mode).watch(model, Situation(problem.task, 0, entropy=ENTROPY)) as to_loss:
        loss = to_loss(problem.losses(model))
    loss.backward()
    torch.testing.assert_close(gradient(model), 2 * once)


def test_keeping_gradients_is_chosen_by_what_it_takes():
    settings = {"method": "upgrad", "keep_megabytes": 1}
    assert build_balancer(BalancingConfig(**settings), K, 2**16).keeps_gradients
    assert not build_balancer(BalancingConfig(**settings), K, 2**16 + 1).keeps_gradients
    assert build_balancer(BalancingConfig(gradients="keep", **settings), K, 10**9).keeps_gradients
    assert not build_balancer(BalancingConfig(gradients="second_pass", **settings), K, 10).keeps_gradients


def test_a_second_pass_is_one_more_backward_pass_and_keeping_none():
    for mode, passes in (("keep", 1), ("second_pass", 2)):
        model, seen = network(), []
        model.final_layer.register_full_backward_hook(lambda *_, seen=seen: seen.append("backward"))
        balanced_step(make("pcgrad", mode), model, Problem())
        assert len(seen) == passes


@pytest.mark.parametrize("method", LOSS_METHODS)
def test_a_loss_method_is_its_weighted_sum_of_gradients(method):
    model, problem, balancer = network(), Problem(), make(method)
    loss = balanced_step(balancer, model, problem)
    jacobian = problem.jacobian(model)
    torch.testing.assert_close(gradient(model), balancer.weights.double() / K @ jacobian, rtol=1e-5, atol=1e-9)
    own = problem.losses(model).view(K, -1).mean(1)
    value, weights = balancer.scalarizer(own.detach(), *ENTROPY)
    torch.testing.assert_close(loss.detach().float(), value.detach())
    torch.testing.assert_close(balancer.weights, weights * K)


@pytest.mark.parametrize("method", ["uw", "famo", "mgda", "none"])
def test_a_request_is_answered_with_the_plain_gradients_whatever_the_weights(method):
    """Also in steps in which a gradient method keeps its weights, and where a task's weight is zero."""
    model, problem, balancer = network(), Problem(), make(method, every_n_steps=2)
    jacobian = problem.jacobian(model)
    balanced_step(balancer, model, problem)
    if method != "none":
        assert not torch.equal(balancer.weights, torch.ones(K))
    if method == "mgda":
        balancer.weights[0] = 0
    balanced_step(balancer, model, problem, step=1, request=Request(halves=2), scale=8.0)
    assert balancer.gramian.coverage == 1
    torch.testing.assert_close(balancer.gramian.total().view(K, 2, K, 2).mean((1, 3)), jacobian @ jacobian.T)
    expected = balancer.weights.double() / K @ jacobian
    torch.testing.assert_close(gradient(model) / 8, expected, rtol=1e-5, atol=1e-9)
    balanced_step(balancer, model, problem, step=3)
    assert balancer.gramian is None


@pytest.mark.parametrize("method", LOSS_METHODS)
def test_a_task_without_samples_counts_with_the_loss_it_had_last(method):
    model, problem, balancer = network(), Problem(), make(method)
    lacking = Problem(torch.where(TASK == 2, 1, TASK))
    balanced_step(balancer, model, lacking)
    assert torch.equal(balancer.weights, torch.ones(K)), "never seen: plain training"
    balanced_step(balancer, model, problem)
    balancer.after_step(1, lambda: problem.losses(model).detach())
    known = problem.losses(model).view(K, -1).mean(1).detach()
    balanced_step(balancer, model, lacking)
    losses = balancer.task_losses(lacking.losses(model).detach(), lacking.task)
    losses[2] = known[2]
    torch.testing.assert_close(balancer.weights, balancer.scalarizer(losses, *ENTROPY)[1] * K)
    balancer.after_step(2, lambda: lacking.losses(model).detach())
    balanced_step(balancer, model, problem)
    assert balancer.weights.isfinite().all()


def test_overflow_leaves_famo_as_it_was():
    model, problem, balancer = network(), Problem(), make("famo")
    balanced_step(balancer, model, problem)
    before = balancer.state()["method"]["logits"].clone()
    balancer.after_step(1, lambda: torch.full((16,), torch.inf))
    infinite = Problem()
    infinite.target[0] = float("inf")
    balanced_step(balancer, model, infinite)
    balancer.after_step(2, lambda: infinite.losses(model).detach())
    assert torch.equal(balancer.state()["method"]["logits"], before)


def test_gradients_are_kept_once_all_are_known_to_be_split():
    model, problem, balancer = network(), Problem(), make("mgda")
    passes = []
    model.final_layer.register_full_backward_hook(lambda *_: passes.append(1))
    for step in range(3):
        balanced_step(balancer, model, problem, step=step)
    assert len(passes) == 2 + 1 + 1


@pytest.mark.parametrize("mode", ["auto", "keep"])
def test_gradients_that_cannot_be_split_are_not_kept(mode):
    """Samples are put in another order: a second pass is right whatever is split, keeping is not."""

    class Shuffling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x, t, y):
            order = torch.arange(len(x)).flip(0)
            hidden = self.inner(x, t, y)
            return hidden[order][order]

    model, problem, balancer = Shuffling(), Problem(), make("mgda", mode)
    if mode == "keep":
        with pytest.raises(UserInputError, match="second_pass"):
            balanced_step(balancer, model, problem)
        return
    for step in range(2):
        balanced_step(balancer, model, problem, step=step)
        assert not balancer.keeps_gradients
        torch.testing.assert_close(gradient(model), balancer.weights / K @ problem.jacobian(model))


def test_learned_weights_get_their_gradients():
    model, problem, balancer = network(), Problem(), make("uw")
    balanced_step(balancer, model, problem)
    (learned,) = balancer.parameters()
    own = problem.losses(model).view(K, -1).mean(1).detach() / K
    torch.testing.assert_close(learned.grad, (0.5 * (1 - own)).float())


def test_plain_training_is_the_mean():
    model, problem = network(), Problem()
    balanced_step(make("none"), model, problem)
    torch.testing.assert_close(gradient(model), problem.jacobian(model).mean(0))
