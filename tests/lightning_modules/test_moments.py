import torch

from lightning_modules.moments import add_moments, interval_means
from lightning_modules.timesteps import TimestepIntervals


def test_interval_means_weigh_each_interval_by_its_width():
    moments = torch.zeros(3, 1000, dtype=torch.float64)
    add_moments(moments, torch.tensor([0, 10, 500]), torch.tensor([1.0, 3.0, 10.0]))
    means = interval_means(moments, TimestepIntervals.explicit([0, 250, 1000]), "loss/val")
    assert {key: round(value.item(), 6) for key, value in means.items()} == {
        "loss/val": 0.25 * 2 + 0.75 * 10,
        "loss/val_t000-249": 2.0,
        "loss/val_t250-999": 10.0,
    }


def test_moments_accumulate_repeated_timesteps():
    moments = torch.zeros(3, 5, dtype=torch.float64)
    add_moments(moments, torch.tensor([1, 1, 4]), torch.tensor([2.0, 3.0, 5.0]))
    assert moments.tolist() == [[0, 2, 0, 0, 1], [0, 5, 0, 0, 5], [0, 13, 0, 0, 25]]
