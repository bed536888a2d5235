"""The history of losses against improved DDPM's, kept in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.timesteps import TimestepIntervals
from tests.lightning_modules.samplers.support import build

INTERVALS = TimestepIntervals.explicit([0, 2, 7])


def brute_force(batches, num_timesteps, history, uniform):
    """Probabilities after the batches of (t, loss), one loss at a time, the oldest forgotten first."""
    latest = [[] for _ in range(num_timesteps)]
    for batch in batches:
        for t, loss in batch:
            latest[t] = [*latest[t], loss][-history:]
    if any(len(losses) < history for losses in latest):
        return [1 / num_timesteps] * num_timesteps
    roots = [math.sqrt(sum(loss**2 for loss in losses) / history) for losses in latest]
    return [(1 - uniform) * root / sum(roots) + uniform / num_timesteps for root in roots]


@pytest.mark.parametrize("history", [1, 3, 10])
def test_probabilities_follow_the_history(history):
    """Batches with repeats of a timestep, some more often than the history is long."""
    sampler = build("loss_second_moment", INTERVALS, loss_second_moment_history=history)
    generator = torch.Generator().manual_seed(0)
    batches, informed = [], 0
    for step in range(12):
        t = torch.randint(0, 7 if step % 3 else 2, (25,), generator=generator)
        losses = torch.rand(25, generator=generator) * (1 + t)
        sampler.observe_losses(t, losses)
        batches.append(list(zip(t.tolist(), losses.tolist(), strict=True)))
        expected = brute_force(batches, 7, history, 0.001)
        torch.testing.assert_close(sampler.probabilities(), torch.tensor(expected, dtype=torch.float64))
        informed += len(set(expected)) > 1
    assert 0 < informed < 12


def test_it_is_uniform_until_the_last_history_is_full():
    sampler = build("loss_second_moment", INTERVALS)
    t = torch.arange(7).repeat(10)
    sampler.observe_losses(t[:-1], 1.0 + t[:-1])
    assert sampler.probabilities().unique().numel() == 1
    assert (sampler.importance(t) == 1).all()
    sampler.observe_losses(t[-1:], 1.0 + t[-1:])
    torch.testing.assert_close(
        sampler.probabilities(), 0.999 * torch.arange(1, 8, dtype=torch.float64) / 28 + 0.001 / 7
    )


def test_losses_that_are_not_finite_or_all_zero_do_no_harm():
    sampler = build("loss_second_moment", INTERVALS, loss_second_moment_history=1)
    t = torch.arange(7)
    sampler.observe_losses(t, torch.tensor([torch.nan, torch.inf, 1.0, 1.0, 1.0, 1.0, 1.0]))
    assert sampler.seen.tolist() == [0, 0, 1, 1, 1, 1, 1]
    sampler.observe_losses(t, torch.zeros(7))
    torch.testing.assert_close(sampler.probabilities(), torch.full((7,), 1 / 7, dtype=torch.float64))
    sampler.observe_losses(t[:0], torch.zeros(0))


def test_losses_of_half_precision_and_with_a_graph_are_taken():
    sampler = build("loss_second_moment", INTERVALS, loss_second_moment_history=1)
    losses = torch.ones(7, dtype=torch.bfloat16, requires_grad=True) * 2
    sampler.observe_losses(torch.arange(7), losses)
    assert sampler.history.flatten().tolist() == [2.0] * 7
    assert not sampler.history.requires_grad


def test_sampling_by_the_loss_lowers_the_variance_of_the_loss():
    """Steep losses, known exactly: the weighted mean of a batch varies less than under uniform timesteps."""
    sampler = build("loss_second_moment", loss_second_moment_history=1)
    value = torch.exp(-torch.arange(40) / 5.0)
    sampler.observe_losses(torch.arange(40), value)
    uniform = build("uniform")
    variances = []
    for one in (sampler, uniform):
        generator = torch.Generator().manual_seed(1)
        draws = [one.sample(16, generator) for _ in range(1500)]
        means = torch.stack([(one.importance(t) * value[t]).mean() for t in draws])
        assert means.mean().item() == pytest.approx(value.mean().item(), rel=0.05)
        variances.append(means.var().item())
    assert variances[0] < 0.01 * variances[1]
