"""Tests for `lightning_modules/gradients/verification.py`: what the recorder cannot see, this does."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lightning_modules.gradients.verification import deviations, weighted_gradient, without_layers
from tests.lightning_modules.gradients.support import GROUP
from tests.lightning_modules.gradients.test_coverage import X, linears, shaken, squares
from tests.oracles.group_gradients import record, trainable, truth

PERMUTED = torch.tensor([2, 0, 3, 1, 7, 6, 4, 5])
MIXING = {
    "scaled by the largest": lambda s, x: s.b(s.a(x) / s.a(x).abs().max()),
    "softmax": lambda s, x: s.b(s.a(x).softmax(0)),
    "running sum": lambda s, x: s.b(s.a(x).cumsum(0)),
    "sorted": lambda s, x: s.b(s.a(x).sort(0)[0]),
    "distances": lambda s, x: s.b(torch.cdist(s.a(x), s.a(x))),
    "attention": lambda s, x: s.b(F.scaled_dot_product_attention(*[s.a(x)[None]] * 3)[0]),
    "gathered": lambda s, x: s.b(s.a(x).gather(0, PERMUTED[:, None].expand(-1, 8))),
    "looked up": lambda s, x: s.b(F.embedding(PERMUTED, s.a(x))),
    "added in place": lambda s, x: s.b(torch.zeros_like(x).index_add_(0, PERMUTED // 2, s.a(x))),
}


def wrong_layers(model, losses):
    """Layers whose Gramian is not the true one, and those that verification names."""
    gramian, _ = record(model, losses, GROUP, 5)
    expected = weighted_gradient(losses(), trainable(model), GROUP, 5)
    true = truth(model, losses, GROUP, 5).layers
    found = dict(zip(gramian.layers, gramian.values, strict=True))
    wrong = {layer for layer in true if (found[layer] - true[layer]).abs().max() > 1e-6 * true[layer].abs().max()}
    return gramian, wrong, {layer for layer, error in deviations(gramian, expected).items() if error > 1e-8}


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_mix_are_noticed(name):
    model = shaken(linears(MIXING[name]))
    gramian, wrong, named = wrong_layers(model, lambda: squares(model(X)))
    assert wrong
    assert named == wrong
    honest = without_layers(gramian, named, trainable(model))
    assert {parameter.rpartition(".")[0] for parameter in honest.uncovered} == wrong
    assert honest.coverage < 1


def test_a_loss_that_depends_on_its_mean_is_noticed():
    model = shaken(linears(lambda s, x: s.b(s.a(x).tanh())))
    _, wrong, named = wrong_layers(model, lambda: squares(model(X)) * squares(model(X)).mean())
    assert named == wrong == {"a", "b"}


@pytest.mark.parametrize("seed", range(3))
def test_a_right_gramian_is_confirmed(seed):
    model = shaken(linears(lambda s, x: s.b(s.a(x).tanh())))
    gramian, _ = record(model, lambda: squares(model(X)), GROUP, 5)
    expected = weighted_gradient(squares(model(X)), trainable(model), GROUP, 5, loss_scale=2.0**10, seed=seed)
    assert max(deviations(gramian, expected).values()) < 1e-12
    assert expected.weights[3] == 0, "an empty group has no mean loss"
