"""Tests for `lightning_modules/checkpoint.py`: what comes back from a file."""

import copy

import pytest
import torch

from lightning_modules.checkpoint import load_denoiser
from lightning_modules.errors import UserInputError
from tests.conftest import BACKBONE, UNET


def save(module, path, **changes):
    settings = copy.deepcopy(dict(module.hparams))
    for name, value in changes.items():
        settings["backbone"].pop(name) if value is None else settings["backbone"].update({name: value})
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": settings}, path)
    return path


@pytest.mark.parametrize("backbone", [BACKBONE, UNET], ids=["dit", "unet"])
@pytest.mark.parametrize("method", ["baseline", "dtr", "random"])
def test_a_checkpoint_gives_back_the_model_and_its_average(make_denoiser, batch, tmp_path, backbone, method):
    module = make_denoiser(method, backbone=backbone).eval()
    loaded = load_denoiser(save(module, tmp_path / "a.ckpt"))
    assert loaded.backbone.config == backbone
    assert loaded.hparams == module.hparams
    assert not loaded.training
    drawn = module.draw(batch, 0)
    for of in (lambda m: m.backbone, lambda m: m.ema.module):
        assert torch.equal(loaded.sample_losses(drawn, of(loaded)).loss, module.sample_losses(drawn, of(module)).loss)
    assert loaded.method == method
    assert (loaded.backbone.routing is None) == (method == "baseline")


def test_a_checkpoint_of_the_time_before_there_were_unets_is_a_dit(make_denoiser, tmp_path):
    loaded = load_denoiser(save(make_denoiser("dtr"), tmp_path / "old.ckpt", kind=None))
    assert loaded.backbone.config == BACKBONE


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "mamba"}, "unknown backbone kind 'mamba'"),
        ({"kind": None}, "does not fit this version"),
        ({"channels": None}, "channels"),
        ({"depth": 3}, "depth"),
        ({"channels": 16}, "size mismatch"),
        ({"channels": 6}, "norm_groups"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(make_denoiser, tmp_path, changes, says):
    with pytest.raises(UserInputError, match=says):
        load_denoiser(save(make_denoiser(backbone=UNET), tmp_path / "bad.ckpt", **changes))
