"""Tests for `lightning_modules/seeding.py`."""

import itertools

import torch

from lightning_modules.seeding import seeded_dropout, seeded_generator


def test_equal_numbers_give_equal_streams_and_any_other_number_another():
    def draw(*entropy):
        return tuple(torch.rand(4, generator=seeded_generator(*entropy)).tolist())

    assert draw(1, 2, 3) == draw(1, 2, 3)
    draws = {draw(*entropy) for entropy in itertools.product([0, 1, 2**40], repeat=3)}
    assert len(draws) == 27


def test_dropout_follows_its_numbers_and_nothing_else_notices():
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.5))
    x = torch.randn(3, 8)

    def drop(*entropy):
        with seeded_dropout(model, *entropy):
            return model(x)

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = drop(1, 2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, drop(1, 2))
    assert not torch.equal(first, drop(1, 3))
    without = torch.nn.Dropout(0.0)
    with seeded_dropout(without, 1):
        assert torch.initial_seed() == 7, "a model without dropout is left alone"
