"""Tests for `experiments/probing/data.py` and `subject.py`: which network and which data are measured."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image

from analysis.reading.telemetry import read_telemetry
from experiments.probing.data import find_data
from experiments.probing.subject import load_subject
from lightning_modules.backbones.dit import DiT, DiTConfig
from lightning_modules.errors import UserInputError
from tests.conftest import BACKBONE
from tests.experiments.probing.helpers import parse, prepare, run_probe, save_checkpoint

PUBLISHED = DiTConfig(
    input_size=8, patch_size=4, in_channels=4, hidden_size=64, depth=4, num_heads=4, num_classes=10, learn_sigma=True
)


@pytest.fixture
def checkpoint(make_denoiser, tmp_path):
    return save_checkpoint(make_denoiser(), tmp_path / "last.ckpt")


@pytest.fixture
def published(tmp_path):
    """A small DiT as DiT's training script saves it."""
    torch.manual_seed(0)
    model = DiT(PUBLISHED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    contents = {"model": model.state_dict(), "ema": model.state_dict(), "opt": {}, "args": argparse.Namespace()}
    torch.save(contents, tmp_path / "DiT.pt")
    return tmp_path / "DiT.pt"


def latents(channels=4, count=64):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((count, channels, 8, 8)).astype(np.float32)
    return {"x": 5.0 * x, "y": generator.integers(0, 10, count)}


def save_latents(folder, form, arrays):
    path = folder / f"latents.{form}"
    if form == "npz":
        np.savez(path, **arrays)
    elif form == "npy":
        np.save(path, arrays["x"])
    else:
        torch.save({name: torch.from_numpy(value) for name, value in arrays.items()}, path)
    return path


def test_a_published_dit_on_latents_goes_the_whole_way(published, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.probing.summary.interval_figures", lambda run: [])
    path = save_latents(tmp_path, "npz", latents())
    arguments = ["--data=latents", f"--data-path={path}", "--latent-scale=0.2", "--batches=3", "--intervals=4"]
    assert run_probe(published, tmp_path / "out", *arguments) == 0
    said = capsys.readouterr().out
    assert "published weights of a DiT" in said
    assert "standard deviation 1.0" in said
    assert "uniform is assumed" in said
    run = read_telemetry(tmp_path / "out" / "telemetry")
    assert run["gramian"].sizes["gradient_step"] == 3
    assert json.loads(run.attrs["manifest"])["method"] == "baseline"
    assert float(run["group_loss"].mean()) > 0.5  # an untrained network's squared error of noise


@pytest.mark.parametrize("form", ["npz", "npy", "pt"])
def test_latents_are_scaled_and_keep_their_labels(published, tmp_path, form):
    arrays = latents()
    path = save_latents(tmp_path, form, arrays)
    _, subject, batches = prepare(published, "--data=latents", f"--data-path={path}", "--latent-scale=0.18215")
    x, y = batches.data.fetch(list(range(64)))
    torch.testing.assert_close(x, torch.from_numpy(arrays["x"]) * 0.18215)
    drawn = batches.images(1)[1]
    if form == "npy":
        assert (drawn == subject.backbone.null_class).all()
    else:
        assert y.tolist() == arrays["y"].tolist()
        assert set(drawn.tolist()) <= set(range(11))
        assert (drawn < 10).any()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"z": np.zeros((40, 4, 8, 8))}, "cannot read latents"),
        ({"x": np.zeros((40, 8, 8))}, "latents must be real"),
        ({"x": np.zeros((40, 4, 8, 8), int)}, "latents must be real"),
        ({"x": np.zeros((40, 4, 8, 8)), "y": np.zeros(3)}, "latents must be real"),
        ({"x": np.zeros((40, 3, 8, 8))}, r"\(3, 8, 8\)"),
        ({"x": np.zeros((40, 4, 8, 8)), "y": np.full(40, 10)}, "labels from 10 to 10"),
        ({"x": np.zeros((20, 4, 8, 8))}, "20 samples"),
        ({"x": np.where(np.arange(40) == 7, np.nan, 0.0)[:, None, None, None] * np.ones((4, 8, 8))}, "1 of 40 samples"),
        ({"x": np.full((40, 4, 8, 8), 1e300)}, "40 of 40 samples"),
        ({"x": np.zeros((40, 4, 8, 8)), "y": np.full(40, 1.5)}, "whole numbers"),
        ({"x": np.zeros((40, 4, 8, 8)), "y": np.full(40, np.nan)}, "whole numbers"),
    ],
)
def test_latents_that_do_not_fit_are_refused(published, tmp_path, arrays, says):
    np.savez(tmp_path / "latents.npz", **arrays)
    args = parse(published, "--data=latents", f"--data-path={tmp_path / 'latents.npz'}")
    with pytest.raises(UserInputError, match=says):
        find_data(args, load_subject(args, torch.device("cpu")))


def test_latents_that_are_none_are_refused(published, tmp_path):
    (tmp_path / "latents.npz").write_text("nonsense")
    for path, says in ((tmp_path / "latents.npz", "cannot read latents"), (tmp_path / "none.npz", "no file")):
        args = parse(published, "--data=latents", f"--data-path={path}")
        with pytest.raises(UserInputError, match=says):
            find_data(args, load_subject(args, torch.device("cpu")))


def test_a_network_without_null_class_needs_labels(make_denoiser, tmp_path):
    config = dataclasses.replace(BACKBONE, label_dropout=0.0)
    checkpoint = save_checkpoint(make_denoiser(backbone=config), tmp_path / "last.ckpt")
    path = save_latents(tmp_path, "npy", latents(channels=1))
    with pytest.raises(UserInputError, match="no labels y"):
        prepare(checkpoint, "--data=latents", f"--data-path={path}")


def test_an_unconditional_network_gets_no_labels(make_denoiser, tmp_path):
    config = dataclasses.replace(BACKBONE, num_classes=0)
    checkpoint = save_checkpoint(make_denoiser(backbone=config), tmp_path / "last.ckpt")
    _, _, batches = prepare(checkpoint)
    assert batches.images(1)[1] is None


@pytest.fixture
def folder(tmp_path):
    """Three classes of sixteen grey images."""
    generator = np.random.default_rng(0)
    for label in "abc":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(16):
            pixels = generator.integers(0, 256, (9, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{index}.png")
    return tmp_path / "photos"


def test_all_images_of_a_folder_that_is_named(checkpoint, folder):
    _, _, batches = prepare(checkpoint, "--data=image_folder", f"--data-path={folder}")
    assert len(batches.data) == 48
    x, _, _ = batches.images(1)
    assert x.shape == (32, 1, 8, 8)
    assert len(x.flatten(1).unique(dim=0)) == 32


def log_config(tmp_path, data):
    """A run in a fresh store whose configuration names this data; the store's URI and the run's id."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("t", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    client.log_text(run, yaml.safe_dump({"data": data}), "config.yaml")
    return uri, run


def test_the_training_images_are_found_through_the_run(make_denoiser, folder, tmp_path):
    settings = {"root": str(folder), "image_size": 8, "channels": 1, "holdout": 8}
    uri, run = log_config(tmp_path, {"class_path": "experiments.train.ImageFolderData", "init_args": settings})
    checkpoint = save_checkpoint(make_denoiser(), tmp_path / "last.ckpt", data="photos", run_id=run)
    _, _, batches = prepare(checkpoint, f"--tracking-uri={uri}")
    assert (batches.data.name, len(batches.data)) == ("photos", 40)


@pytest.mark.parametrize("known", [True, False])
def test_data_that_cannot_be_found_must_be_named(make_denoiser, tmp_path, known):
    uri, run = log_config(tmp_path, {"class_path": "theirs.Data"})
    checkpoint = save_checkpoint(
        make_denoiser(), tmp_path / "last.ckpt", data="photos", run_id=run if known else "f" * 32
    )
    with pytest.raises(UserInputError, match=r"'photos'.*--data image_folder"):
        prepare(checkpoint, f"--tracking-uri={uri}")


def test_a_store_that_is_not_there_is_not_created(make_denoiser, tmp_path):
    checkpoint = save_checkpoint(make_denoiser(), tmp_path / "last.ckpt", data="photos")
    with pytest.raises(UserInputError, match="'photos'"):
        prepare(checkpoint, f"--tracking-uri=sqlite:///{tmp_path / 'mlflow.db'}")
    assert not (tmp_path / "mlflow.db").exists()


def test_a_published_file_does_not_say_what_it_was_trained_on(published):
    with pytest.raises(UserInputError, match="does not say what it was trained on"):
        prepare(published)


def test_data_of_another_shape_are_refused(published, checkpoint):
    with pytest.raises(UserInputError, match=r"\(1, 8, 8\).*\(4, 8, 8\)"):
        prepare(published, "--data=digits")


def test_weights_alone_are_no_checkpoint(tmp_path, capsys):
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.ckpt")
    assert run_probe(tmp_path / "model.ckpt", tmp_path / "out") == 2
    assert "no 'x_embedder.proj.weight'" in capsys.readouterr().err
