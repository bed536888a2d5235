"""Settings of a U-Net: published sizes, presets, and refusals."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.backbones.unet import UNET_PRESETS, UNet, unet_config
from lightning_modules.errors import UserInputError
from tests.lightning_modules.backbones.test_unet import small_config

# Published parameter counts in millions: Dhariwal & Nichol (2021), table of hyperparameters, for the class-conditional
# ImageNet models and the unconditional LSUN ones; Choi et al. (2022), README, for the light one.
PUBLISHED_MILLIONS = [
    ("ADM-64", 1000, 296),
    ("ADM-128", 1000, 422),
    ("ADM-256", 1000, 554),
    ("ADM-256", 0, 552.5),
    ("ADM-256-light", 0, 93.5),
]


@pytest.mark.parametrize(("preset", "num_classes", "millions"), PUBLISHED_MILLIONS)
def test_adm_has_the_published_sizes(preset, num_classes, millions):
    with torch.device("meta"):  # no memory, no initialisation
        model = UNet(unet_config(preset, in_channels=3, num_classes=num_classes, label_dropout=0.0))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)


def test_the_small_presets_build_and_run():
    assert set(UNET_PRESETS) == {name for name, *_ in PUBLISHED_MILLIONS} | {"UNet-32", "UNet-8"}
    for preset, size, millions in (("UNet-32", 32, 8.0), ("UNet-8", 8, 0.47)):
        model = UNet(unet_config(preset, in_channels=1, num_classes=10, learn_sigma=False))
        output = model(torch.randn(2, 1, size, size), torch.tensor([1, 2]), torch.tensor([3, 10]))
        assert output.shape == (2, 1, size, size)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "culprit"),
    [
        ({"channels": 6}, "level 0 has 6 channels, no multiple of norm_groups 4"),
        ({"channels": 0}, "channels is 0"),
        ({"channel_mult": ()}, "channel_mult is empty"),
        ({"channel_mult": (1, 0)}, "channel_mult"),
        ({"channel_mult": 3}, "channel_mult is 3"),
        ({"channel_mult": (1, 1, 1, 1, 1)}, "input_size 8 cannot be halved 4 times"),
        ({"attention_resolutions": (16, 4)}, "attention_resolutions names 16.* resolutions 8, 4, 2"),
        ({"head_channels": 5}, "level 1 has attention and 16 channels, no multiple of head_channels 5"),
        ({"head_channels": 16}, "level 2 has attention and 24 channels"),
        ({"num_res_blocks": 0}, "num_res_blocks is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"label_dropout": -0.1}, "label_dropout is -0.1"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"kind": "dit"}, "kind 'dit'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(overrides, culprit):
    with pytest.raises(UserInputError, match=culprit):
        small_config(**overrides)


def test_presets_are_refused_by_name():
    with pytest.raises(UserInputError, match="unknown U-Net preset 'ADM-65'"):
        unet_config("ADM-65")
    with pytest.raises(UserInputError, match="unknown U-Net setting depth"):
        unet_config("ADM-64", in_channels=3, depth=3)
    with pytest.raises(UserInputError, match="ADM-64 needs a value for in_channels"):
        unet_config("ADM-64")


def test_lists_from_a_file_become_tuples_and_equal_settings_are_equal():
    assert small_config(channel_mult=[1, 2, 3], attention_resolutions=[4]) == small_config()
    assert len({small_config(), small_config()}) == 1
