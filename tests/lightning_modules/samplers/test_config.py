"""Bad settings of the samplers are refused by name."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.errors import UserInputError
from lightning_modules.samplers import SamplerConfig, build_sampler
from lightning_modules.samplers.interval import StratifiedSampler
from tests.lightning_modules.samplers.support import INTERVALS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "importance"),
        ("log_normal_mean", float("nan")),
        ("log_normal_std", 0.0),
        ("loss_second_moment_history", 0),
        ("loss_second_moment_uniform", 0.0),
        ("loss_second_moment_uniform", 1.5),
        ("gradient_noise_decay", 1.0),
        ("gradient_noise_floor", 0.0),
        ("gradient_noise_moment", "first"),
        ("speed_k", 0.5),
        ("speed_tau", 0),
        ("speed_magnitude", 1.0),
    ],
)
def test_an_error_names_the_setting(field, value):
    with pytest.raises(UserInputError, match=rf"sampler\.{field} is "):
        SamplerConfig(**{field: value})


def test_the_default_is_stratified():
    assert isinstance(build_sampler(SamplerConfig(), INTERVALS, torch.zeros(40)), StratifiedSampler)


def test_a_schedule_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="log_snr must have shape"):
        build_sampler(SamplerConfig(), INTERVALS, torch.zeros(41))
