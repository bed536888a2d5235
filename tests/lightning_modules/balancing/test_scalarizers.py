"""Each loss method against its formula, written out by hand."""

import math

import pytest
import torch

from lightning_modules.balancing.config import LOSS_METHODS, BalancingConfig
from lightning_modules.balancing.scalarizers import LossScalarizer

LOSSES = torch.tensor([0.4, 0.1, 0.02])


def scalarizer(method: str, **settings) -> LossScalarizer:
    return LossScalarizer(BalancingConfig(method=method, **settings), 3)


def test_uncertainty_weighting_is_that_of_ant():
    """0.5 (exp(-s_i) l_i + s_i) with l_i = L_i / K, s_i = 0 at first, learned by the optimizer (ANT's code)."""
    ours = scalarizer("uw")
    (learned,) = ours.parameters()
    s = torch.zeros(3, requires_grad=True)
    optimizers = [torch.optim.AdamW([p], lr=0.025, weight_decay=0.0) for p in (learned, s)]
    for step in range(50):
        value, weights = ours(LOSSES * 0.99**step)
        expected = (0.5 * (torch.exp(-s) * LOSSES * 0.99**step / 3 + s)).sum()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(weights, 0.5 * torch.exp(-s).detach() / 3)
        for optimizer, loss in zip(optimizers, (value, expected), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (s < 0).all()
    torch.testing.assert_close(learned, s)


@pytest.mark.parametrize(("method", "factor"), [("uw", 0.5), ("imtl_l", 1.0)])
def test_learned_weights_end_at_the_inverse_of_the_losses(method, factor):
    """exp(s_i) = L_i / K makes every task's weighted loss the same."""
    ours = scalarizer(method)
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.025)
    for _ in range(2000):
        optimizer.zero_grad()
        value, weights = ours(LOSSES)
        value.backward()
        optimizer.step()
    torch.testing.assert_close(weights * LOSSES, torch.full((3,), factor), rtol=1e-3, atol=0)


def test_dwa_follows_the_ratio_of_the_last_two_windows():
    ours = scalarizer("dwa", dwa_window_steps=2, dwa_temperature=1.5)
    windows = [[LOSSES, LOSSES * 1.2], [LOSSES * 0.9, LOSSES * torch.tensor([0.5, 1.0, 0.7])]]
    step = 0
    for window in windows:
        for losses in window:
            _, weights = ours(losses)
            torch.testing.assert_close(weights, torch.full((3,), 1 / 3), msg="equal until there are two windows")
            step += 1
            ours.after_step(step, lambda: pytest.fail("DWA needs no further pass"))
    first, second = (torch.stack(window).mean(0) for window in windows)
    expected = torch.softmax(second / first / 1.5, 0)  # times K, over K
    torch.testing.assert_close(ours(LOSSES)[1], expected)


def test_famo_follows_the_change_of_the_logarithms():
    """FAMO, algorithm 2: weights z_i / l_i, normalised; logits by Adam on d(sum z_i log l_i's decrease)."""
    ours = scalarizer("famo", learning_rate=0.1)
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1, weight_decay=1e-3)
    losses = LOSSES
    for step in range(5):
        _, weights = ours(losses)
        z = torch.softmax(logits, 0).detach()
        torch.testing.assert_close(weights, z / losses / (z / losses).sum(), rtol=1e-5, atol=0)
        after = losses * torch.tensor([0.9, 0.99, 1.01])
        ours.after_step(step + 1, lambda after=after: after)
        delta = torch.log(losses) - torch.log(after)
        optimizer.zero_grad()
        (torch.softmax(logits, 0) @ delta).backward()
        optimizer.step()
        losses = after
    assert weights[0] / weights.sum() < weights[2] / weights.sum(), "the fastest weighs least"


def test_stch_is_a_smooth_maximum():
    _, weights = scalarizer("stch", stch_mu=0.05)(LOSSES)
    torch.testing.assert_close(weights, torch.softmax(LOSSES / 3 / 0.05, 0))


def test_the_geometric_mean_weighs_by_the_inverse_of_the_loss():
    value, weights = scalarizer("geometric_mean")(LOSSES)
    mean = math.exp(LOSSES.log().mean())
    assert value.item() == pytest.approx(mean)
    torch.testing.assert_close(weights, mean / 3 / LOSSES)


def test_random_weights_follow_from_the_entropy_alone():
    ours = scalarizer("random_weights")
    draws = torch.stack([ours(LOSSES, step)[1] for step in range(2000)])
    assert torch.equal(draws[5], ours(LOSSES, 5)[1])
    torch.testing.assert_close(draws.sum(1), torch.ones(2000))
    torch.testing.assert_close(draws.mean(0), torch.full((3,), 1 / 3), rtol=0.05, atol=0)


@pytest.mark.parametrize("method", LOSS_METHODS)
def test_a_method_goes_on_from_its_state(method):
    first, second = scalarizer(method, dwa_window_steps=2), scalarizer(method, dwa_window_steps=2)
    steps = [
        LOSSES * factor for factor in (1.0, torch.tensor([0.9, 0.8, 0.7]), 0.8, torch.tensor([0.7, 0.9, 0.5]), 0.5)
    ]
    for step, losses in enumerate(steps):
        if step == 3:
            second.load_state_dict(first.state_dict())
            second.load_state(first.state())
        for each in (first, second) if step >= 3 else (first,):
            each(losses, step)
            each.after_step(step + 1, lambda losses=losses: losses * 0.9)
        if step >= 3:
            assert torch.equal(first(LOSSES, 9)[1], second(LOSSES, 9)[1])


def test_only_learned_weights_are_parameters():
    assert {method for method in LOSS_METHODS if list(scalarizer(method).parameters())} == {"uw", "imtl_l"}
