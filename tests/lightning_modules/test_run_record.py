"""Tests for `lightning_modules/run_record.py`: what a run says of its routing, in words and as masks."""

import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest

from lightning_modules import run_record
from lightning_modules.data.digits import DigitsData
from lightning_modules.denoiser import DTRModule
from lightning_modules.routing import MaskConfig
from lightning_modules.run_record import RunRecord, describe
from lightning_modules.tracking import records
from tests.conftest import BACKBONE, DIFFUSION


class Files:
    """A writer that keeps every file it is handed, in order."""

    def __init__(self):
        self.written = []

    def log_file(self, path, content):
        self.written.append((path, content))

    def log_params(self, params):
        self.params = params

    def set_tags(self, tags):
        self.tags = tags

    def masks(self):
        return [dict(np.load(io.BytesIO(content))) for path, content in self.written if path == records.MASKS_PATH]


@pytest.fixture
def files(monkeypatch):
    kept = Files()
    monkeypatch.setattr(run_record, "writer_of", lambda trainer: kept)
    return kept


def routed(**settings):
    return DTRModule(BACKBONE, MaskConfig(beta=0.5, **settings), DIFFUSION)


def test_learned_masks_are_written_again_when_training_has_changed_them(files, fit):
    module = routed(kind="learned", per_block=True)
    names = list(module.backbone.block_channels)
    begun = [module.backbone.routing.block_masks(block) for block in range(2)]
    # Masks change when logits of 0.01 have been moved by steps of 0.1.
    module.optimization = dataclasses.replace(module.optimization, learning_rate=0.1)
    fit(module, RunRecord(DigitsData(batch_size=16)), steps=5)
    first, last = files.masks()
    for block, name in enumerate(names):
        assert (first[name] == begun[block]).all()
        assert (last[name] == module.backbone.routing.block_masks(block)).all()
        assert (last[name] != first[name]).any()
    assert files.params["routing.kind"] == "learned"
    assert files.params["routing.beta_last"] == files.params["routing.cluster_bounds"] == "null"


@pytest.mark.parametrize("kind", ["dtr", "random", "cluster"])
def test_masks_that_stay_are_written_once(files, fit, kind):
    module = routed(kind=kind, per_block=True)
    fit(module, RunRecord(DigitsData(batch_size=16)), steps=1)
    (masks,) = files.masks()
    for block, name in enumerate(module.backbone.block_channels):
        assert (masks[name] == module.backbone.routing.block_masks(block)).all()
    assert (masks["blocks.0"] != masks["blocks.1"]).any()


def test_a_plain_run_has_no_masks(files, fit, make_denoiser):
    fit(make_denoiser(), RunRecord(DigitsData(batch_size=16)), steps=1)
    assert files.masks() == []
    assert "Plain denoiser" in files.tags["mlflow.note.content"]


TRAINER = SimpleNamespace(max_steps=1000, accumulate_grad_batches=1)


def said(settings, method="dtr"):
    data = SimpleNamespace(batch_size=16, name="digits")
    manifest = run_record.run_manifest(routed(**settings), data, TRAINER)
    manifest = records.RunManifest.from_json(dataclasses.replace(manifest, method=method).to_json())
    return describe(manifest, TRAINER)


@pytest.mark.parametrize(
    ("settings", "name", "words"),
    [
        (
            {},
            "Denoising Task Routing (DTR)",
            "beta = 0.5 of every block's channels: a window that slides with alpha = 4.0.",
        ),
        ({"kind": "random"}, "Random routing (R-TR)", "channels: a random subset per timestep."),
        (
            {"kind": "cluster"},
            "Cluster masks",
            "common ones, and others of its own for each of 8 clusters of timesteps.",
        ),
        (
            {"kind": "learned", "cluster_bounds": [0, 10, 1000]},
            "Learned masks",
            "a subset for each cluster of timesteps (bounds 0, 10, 1000), learned by a straight-through estimator.",
        ),
        (
            {"beta_last": 0.25, "per_block": True},
            "Denoising Task Routing (DTR)",
            "channels (0.25 in the last block, linear in between): a window that slides with alpha = 4.0, in an order "
            "of channels of each block's own.",
        ),
    ],
)
def test_every_kind_is_described_in_words(settings, name, words):
    text = said(settings)
    assert text.startswith(f"**{name}**, ")
    assert words in text
    assert "compared as" not in text


def test_a_method_with_several_parts_is_named_beside_its_routing():
    assert said({"kind": "cluster"}, "cluster+pcgrad").startswith("**Cluster masks**, compared as `cluster+pcgrad`, ")
