"""Arithmetic against published numbers, and against counting by hand."""

import pytest

from lightning_modules.backbones.cost import flops_per_sample
from lightning_modules.backbones.dit import DiTConfig, dit_config
from tests.conftest import UNET


@pytest.mark.parametrize(("preset", "published"), [("DiT-S/2", 6.06e9), ("DiT-B/2", 23.01e9), ("DiT-XL/2", 118.64e9)])
def test_published_sizes_take_the_published_multiply_adds(preset, published):
    """At 256 x 256, latents of 32 x 32 (DiT, table 4; B and XL as Switch-DiT, table 2, gives them)."""
    config = dit_config(preset, input_size=32, in_channels=4, num_classes=1000)
    assert flops_per_sample(config, backward=False) / 2 == pytest.approx(published, rel=1e-3)


def test_a_small_dit_is_counted_by_hand():
    width, tokens, patch, depth = 16, 4, 16, 2
    config = DiTConfig(
        input_size=8, patch_size=4, in_channels=1, hidden_size=width, depth=depth, num_heads=2, num_classes=0,
        learn_sigma=False,
    )  # fmt: skip
    block = tokens * (3 + 1 + 2 * 4) * width**2 + 2 * tokens**2 * width + 6 * width**2
    others = tokens * patch * width + 256 * width + width**2 + 2 * width**2 + tokens * width * patch
    assert flops_per_sample(config, backward=False) == 2 * (depth * block + others)


def test_the_backward_pass_takes_twice_the_forward_pass():
    for config in (dit_config("DiT-S/4", input_size=32, in_channels=4, num_classes=1000), UNET):
        assert flops_per_sample(config) == pytest.approx(3 * flops_per_sample(config, backward=False), rel=0.03)
