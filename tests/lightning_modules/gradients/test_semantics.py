"""What a Gramian means: reductions, scales, weights, label dropout, and its sum."""

import importlib

import pytest
import torch
from torch import nn

from lightning_modules.gradients import GramianRecorder
from tests.lightning_modules.gradients.support import GROUP, Model, normal, shaken, squares
from tests.oracles.group_gradients import assert_exact, errors, record, truth


def network():
    return shaken(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))


X = normal(8, 4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_groups_gradient_is_that_of_its_mean_loss_whatever_the_batch_is_reduced_by(reduction):
    model = network()
    assert_exact(model, lambda: squares(model(X)), GROUP, 5, reduction=reduction)


def test_a_scale_turns_weighted_losses_back():
    """Importance weights per group in the loss that trains, none in what is measured."""
    model = network()
    weight = torch.tensor([0.5, 2.0, 3.0, 1.0, 0.25], dtype=torch.float64)
    expected = truth(model, lambda: squares(model(X)), GROUP, 5)
    gramian, _ = record(model, lambda: squares(model(X)) * weight[GROUP], GROUP, 5, scale=1 / weight)
    assert max(errors(gramian, expected).values()) < 1e-10


def test_loss_weights_are_part_of_the_gradient():
    model = network()
    weight = torch.linspace(0.1, 3, 8, dtype=torch.float64)
    assert_exact(model, lambda: squares(model(X)) * weight, GROUP, 5)


def test_label_dropout():
    """Labels are replaced by the null class at random, as for classifier-free guidance."""

    def forward(self, x, y):
        y = torch.where(torch.rand(len(y)) < 0.5, 3, y)
        return self.out((self.inner(x) + self.labels(y)).tanh())

    model = shaken(Model(forward, inner=nn.Linear(4, 6), labels=nn.Embedding(4, 6), out=nn.Linear(6, 2)))
    assert_exact(model, lambda: squares(model(X, torch.arange(8) % 3)), GROUP, 5)


def test_entries_weighted_by_counts_sum_to_the_squared_norm_of_the_gradient():
    model = network()
    gramian, grad = record(model, lambda: squares(model(X)), GROUP, 5)
    share = gramian.counts.double() / gramian.counts.sum()
    for layer, value in zip(gramian.layers, gramian.values, strict=True):
        norm = sum(g.square().sum() for name, g in grad.items() if name.startswith(f"{layer}."))
        torch.testing.assert_close(share @ value @ share, norm, rtol=1e-12, atol=0)


def test_blocks_and_total_sum_the_layers():
    model = network()
    gramian, _ = record(model, lambda: squares(model(X)), GROUP, 5)
    torch.testing.assert_close(gramian.total(), gramian.values[0] + gramian.values[1])
    assert list(gramian.by_block(["0"])) == ["0", "2"]


@pytest.mark.parametrize("num_groups", [5, 8])
def test_products_of_samples_equal_products_of_gradients(monkeypatch, num_groups):
    """The shortcut for one row per sample, forced and forbidden."""
    model = network()
    operator = importlib.import_module("lightning_modules.gradients.operators.linear")
    values = []
    for cheaper in (True, False):
        monkeypatch.setattr(operator, "_products_are_cheaper", lambda *_, cheaper=cheaper: cheaper)
        values.append(assert_exact(model, lambda: squares(model(X)), GROUP, num_groups).values)
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)


def test_empty_groups_have_zero_rows():
    model = network()
    gramian, _ = record(model, lambda: squares(model(X)), GROUP, 5)
    assert gramian.counts[3] == 0
    assert not gramian.values[:, 3].any()
    assert not gramian.values[:, :, 3].any()


def test_a_collector_gets_every_groups_gradient():
    class Rows:
        def __init__(self, sizes):
            self.rows = [torch.zeros(5, size, dtype=torch.float64) for size in sizes]

        def collect(self, index, start, rows):
            self.rows[index][:, start : start + rows.shape[1]] += rows

        def finish(self, factors):
            self.rows = [rows * factors[:, None] for rows in self.rows]

    model = network()
    collector = Rows([p.numel() for p in model.parameters()])
    recorder = GramianRecorder(model, GROUP, 5, collector=collector)
    with recorder:
        squares(model(X)).mean().backward()
    recorder.finish()
    for index in (0, 1, 2, 4):
        parts = torch.autograd.grad(squares(model(X))[index == GROUP].mean(), list(model.parameters()))
        for rows, part in zip(collector.rows, parts, strict=True):
            torch.testing.assert_close(rows[index], part.flatten(), rtol=1e-12, atol=1e-14)
    with pytest.raises(TypeError, match="Rows"):
        recorder.result()


@pytest.mark.parametrize(
    ("group", "settings", "message"),
    [
        (torch.zeros(8), {}, "vector"),
        (torch.zeros(8, 1, dtype=torch.long), {}, "vector"),
        (torch.zeros(0, dtype=torch.long), {}, "vector"),
        (torch.full((8,), 5), {}, r"0\.\.4, got 5"),
        (torch.full((8,), -1), {}, r"got -1"),
        (GROUP, {"reduction": "max"}, "reduction"),
        (GROUP, {"processes": "some"}, "processes"),
    ],
)
def test_bad_arguments_are_refused(group, settings, message):
    with pytest.raises(ValueError, match=message):
        GramianRecorder(network(), group, 5, **settings)


def test_a_model_without_trained_parameters_is_refused():
    with pytest.raises(ValueError, match="nothing to measure"):
        GramianRecorder(network().requires_grad_(False), GROUP, 5)
