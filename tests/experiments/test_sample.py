"""Tests for `experiments/sample.py`."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.__main__ import main
from lightning_modules.sample_grid import image_grid
from tests.conftest import BACKBONE


@pytest.fixture
def checkpoint(tmp_path, make_denoiser):
    module = make_denoiser("dtr")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # far from zero, so that the output depends visibly on everything
        for model in (module.backbone, module.ema.module):
            for parameter in model.parameters():
                parameter.normal_(std=0.3, generator=generator)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    return path


def draw(checkpoint, out, *arguments):
    options = ["--steps=3", "--count=4", "--columns=2", f"--out={out}", *arguments]
    return main(["sample", str(checkpoint), *options])


def test_samples_depend_on_seed_labels_and_weights(checkpoint, tmp_path):
    pictures = {}
    for name, arguments in {
        "first": [],
        "again": [],
        "seed": ["--seed=1"],
        "labels": ["--labels", "3"],
        "guided": ["--guidance-scale=3"],
        "raw": ["--raw-weights"],
    }.items():
        assert draw(checkpoint, tmp_path / f"{name}.png", *arguments) == 0
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))
    assert pictures["first"].shape[2] == 3
    assert (pictures["first"] == pictures["again"]).all()
    for name in ("seed", "labels", "guided", "raw"):
        assert (pictures["first"] != pictures[name]).any(), name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--labels", "10"], "0..9"), (["--count=0"], "--count"), (["--out=x.txt"], ".png"), (["--steps=0"], "steps")],
)
def test_bad_arguments_are_refused(checkpoint, tmp_path, capsys, arguments, says):
    assert draw(checkpoint, tmp_path / "x.png", *arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_what_is_no_checkpoint_is_refused(tmp_path, capsys, content):
    path = tmp_path / "model.ckpt"
    if content is not None:
        path.write_bytes(content)
    assert draw(path, tmp_path / "x.png") == 2
    assert "model.ckpt" in capsys.readouterr().err


def test_a_model_without_null_class_cannot_be_guided(tmp_path, make_denoiser, capsys):
    module = make_denoiser(backbone=dataclasses.replace(BACKBONE, num_classes=0))
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    assert draw(path, tmp_path / "x.png", "--guidance-scale=2") == 2
    assert "--guidance-scale" in capsys.readouterr().err
    assert draw(path, tmp_path / "x.png") == 0


def test_weights_alone_are_no_checkpoint(tmp_path, capsys):
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.ckpt")
    assert draw(tmp_path / "model.ckpt", tmp_path / "x.png") == 2
    assert "not a checkpoint of DTR Lab" in capsys.readouterr().err


def test_a_grid_places_images_row_by_row():
    images = torch.stack([torch.full((1, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    grid = image_grid(images, columns=2, min_height=1)
    assert grid.shape == (6, 6, 3)
    assert [grid[row, column, 0] for row, column in ((0, 0), (0, 3), (3, 0), (3, 3))] == [0, 128, 255, 255]
    assert image_grid(images, columns=2).shape[0] >= 256
