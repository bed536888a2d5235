"""Tests for `lightning_modules/seeding.py`."""

import itertools

import torch

from lightning_modules.seeding import seeded_generator


def test_equal_numbers_give_equal_streams_and_any_other_number_another():
    def draw(*entropy):
        return tuple(torch.rand(4, generator=seeded_generator(*entropy)).tolist())

    assert draw(1, 2, 3) == draw(1, 2, 3)
    draws = {draw(*entropy) for entropy in itertools.product([0, 1, 2**40], repeat=3)}
    assert len(draws) == 27
