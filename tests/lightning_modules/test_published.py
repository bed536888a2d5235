"""Tests for `lightning_modules/published.py`: small DiTs saved as the official files are."""

import argparse
import dataclasses
import pickle

import pytest
import torch

from lightning_modules.backbones.dit import DIT_PRESETS, DiT, DiTConfig, dit_config
from lightning_modules.errors import UserInputError
from lightning_modules.published import infer_config, load_published, read_weights_file

CONFIG = DiTConfig(
    input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=4, num_heads=4, num_classes=10, learn_sigma=True
)
"""Of the width and depth of DiT-Ti, so that its heads are known."""


def awake(config: DiTConfig, seed: int) -> DiT:
    """A DiT whose output depends on all of its weights."""
    torch.manual_seed(seed)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture
def trained():
    return awake(CONFIG, 1)


@pytest.fixture
def averaged():
    return awake(CONFIG, 2)


@pytest.fixture
def training_checkpoint(trained, averaged):
    """As DiT's train.py saves it."""
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)
    arguments = argparse.Namespace(model="DiT-XL/2", image_size=256, num_classes=10, vae="ema", global_seed=0)
    return {
        "model": trained.state_dict(),
        "ema": averaged.state_dict(),
        "opt": optimizer.state_dict(),
        "args": arguments,
    }


def save(contents, tmp_path):
    path = tmp_path / "DiT.pt"
    torch.save(contents, path)
    return path


def output(model, config=CONFIG):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, config.in_channels, config.input_size, config.input_size, generator=generator)
    y = torch.tensor([0, 1, config.num_classes - 1]) if config.num_classes else None
    return model(x, torch.tensor([0, 500, 999]), y)


def test_a_plain_state_dict_gives_the_same_network(trained, tmp_path):
    module = load_published(save(trained.state_dict(), tmp_path))
    assert module.backbone.config == CONFIG
    torch.testing.assert_close(output(module.backbone), output(trained), rtol=0, atol=0)
    assert module.ema.module is module.backbone
    assert (module.diffusion.config.schedule, module.diffusion.config.variance) == ("linear", "learned_range")
    assert not module.training


def test_a_training_checkpoint_gives_the_average_unless_asked_for_the_trained_weights(
    training_checkpoint, trained, averaged, tmp_path
):
    path = save(training_checkpoint, tmp_path)
    torch.testing.assert_close(output(load_published(path).backbone), output(averaged), rtol=0, atol=0)
    torch.testing.assert_close(output(load_published(path, raw=True).backbone), output(trained), rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"learn_sigma": False},
        {"num_classes": 0},
        {"input_size": 16, "patch_size": 4},
        {"in_channels": 1, "mlp_ratio": 2.0},
    ],
)
def test_the_shape_is_read_from_the_weights(changes, tmp_path):
    config = dataclasses.replace(CONFIG, **changes)
    found = infer_config(DiT(config).state_dict(), "file")
    if config.num_classes == 0:
        config = dataclasses.replace(config, label_dropout=0.0)  # means nothing without classes
    assert found == config


def test_a_fixed_variance_is_recognised(tmp_path):
    config = dataclasses.replace(CONFIG, learn_sigma=False)
    module = load_published(save(DiT(config).state_dict(), tmp_path))
    assert module.diffusion.config.variance == "fixed_large"


@pytest.mark.parametrize("preset", ["DiT-XL/2", "DiT-L/4", "DiT-B/8", "DiT-S/2"])
def test_the_published_sizes_have_known_heads(preset):
    config = dit_config(preset, input_size=64, in_channels=4, num_classes=1000)
    with torch.device("meta"):
        assert infer_config(_shapes(config), "file") == config
    assert config.num_heads == DIT_PRESETS[preset]["num_heads"]


def _shapes(config):
    """Only what the shape is read from, and the last block: building a DiT-XL takes seconds."""
    p = config.patch_size
    return {
        "x_embedder.proj.weight": torch.empty(config.hidden_size, config.in_channels, p, p),
        "pos_embed": torch.empty(1, (config.input_size // p) ** 2, config.hidden_size),
        "y_embedder.embedding_table.weight": torch.empty(config.num_classes + 1, config.hidden_size),
        "blocks.0.mlp.fc1.weight": torch.empty(4 * config.hidden_size, config.hidden_size),
        f"blocks.{config.depth - 1}.mlp.fc1.weight": torch.empty(4 * config.hidden_size, config.hidden_size),
        "final_layer.linear.weight": torch.empty(p * p * config.out_channels, config.hidden_size),
    }


def test_the_scripts_arguments_tell_whether_there_is_a_null_class(tmp_path):
    config = dataclasses.replace(CONFIG, label_dropout=0.0)
    weights = DiT(config).state_dict()
    contents = {"model": weights, "ema": weights, "opt": {}, "args": argparse.Namespace(num_classes=10)}
    assert load_published(save(contents, tmp_path)).backbone.config == config
    assert infer_config(weights, "file").num_classes == 9  # without them, the last row is taken for the null class


def test_heads_of_an_unpublished_size_must_be_given(tmp_path):
    config = dataclasses.replace(CONFIG, hidden_size=32, num_heads=2)
    path = save(DiT(config).state_dict(), tmp_path)
    with pytest.raises(UserInputError, match=r"width 32 and depth 4.*--num-heads"):
        load_published(path)
    assert load_published(path, num_heads=2).backbone.config == config
    with pytest.raises(UserInputError, match="num_heads"):
        load_published(path, num_heads=3)


def damaged(weights, change):
    weights = dict(weights)
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("pos_embed"), "no 'pos_embed'"),
        (lambda w: w.pop("blocks.1.attn.qkv.bias"), r"lacks 'blocks\.1\.attn\.qkv\.bias'"),
        (lambda w: w.update({"mask": torch.zeros(1)}), "unknown 'mask'"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 15, 64)}), "15 tokens"),
        (lambda w: w.update({"pos_embed": torch.zeros(15, 64)}), r"'pos_embed' has shape \(15, 64\)"),
        (lambda w: w.update({"final_layer.linear.weight": torch.zeros(12, 64)}), "puts out 12 values"),
        (lambda w: w.update({"blocks.2.attn.proj.bias": torch.zeros(32)}), r"'blocks\.2\.attn\.proj\.bias'.*\(32,\)"),
    ],
)
def test_what_does_not_fit_is_named(trained, tmp_path, change, says):
    with pytest.raises(UserInputError, match=says) as caught:
        load_published(save(damaged(trained.state_dict(), change), tmp_path))
    assert "DiT.pt" in str(caught.value)


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ({"epoch": 3}, "holds no weights"),
        ([1, 2], "holds a list"),
        ({"conv.weight": torch.zeros(3)}, r"no 'x_embedder\.proj\.weight' \('conv\.weight'\)"),
    ],
)
def test_what_is_no_dit_is_refused(tmp_path, contents, says):
    with pytest.raises(UserInputError, match=says):
        load_published(save(contents, tmp_path))


def test_missing_weights_of_a_training_checkpoint_are_named(training_checkpoint, tmp_path):
    training_checkpoint["ema"] = None
    path = save(training_checkpoint, tmp_path)
    with pytest.raises(UserInputError, match=r"'ema'.*--raw-weights"):
        load_published(path)
    assert load_published(path, raw=True).backbone.config == CONFIG


class Harmful:
    """Would write a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_code_in_a_file_does_not_run(trained, tmp_path):
    target = tmp_path / "harmed"
    path = save({**trained.state_dict(), "extra": Harmful(str(target))}, tmp_path)
    with pytest.raises(UserInputError, match="more than weights"):
        load_published(path)
    assert not target.exists()
    with path.open("rb"), pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_files_that_cannot_be_read_are_refused(trained, tmp_path):
    with pytest.raises(UserInputError, match="no checkpoint at"):
        read_weights_file(tmp_path / "none.pt")
    path = save(trained.state_dict(), tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserInputError, match="cannot read checkpoint"):
        read_weights_file(path)
    with pytest.raises(UserInputError, match="is a folder"):
        read_weights_file(tmp_path)
    for junk in (b"junk" * 100, b"\x80\x02", b"c" * 50, b"\xff" * 400, b"I1x\n."):
        path.write_bytes(junk)
        with pytest.raises(UserInputError, match="cannot read checkpoint"):
            read_weights_file(path)
    path.write_bytes(b"")
    with pytest.raises(UserInputError, match="cannot read checkpoint"):
        read_weights_file(path)


def test_files_in_the_format_before_zip_are_read(trained, tmp_path):
    path = tmp_path / "DiT.pt"
    torch.save(trained.state_dict(), path, _use_new_zipfile_serialization=False)
    torch.testing.assert_close(output(load_published(path).backbone), output(trained), rtol=0, atol=0)
