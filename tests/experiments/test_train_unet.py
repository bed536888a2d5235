"""`dtr-lab train` and `dtr-lab sample` with a U-Net: whole small trainings, resuming, and refusals."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient

from experiments.__main__ import main
from lightning_modules.checkpoint import load_denoiser
from lightning_modules.tracking import records

CONFIGS = Path(__file__).parents[2] / "experiments" / "digits"
BACKBONE = "--model.init_args.backbone"
SMALL = [
    f"{BACKBONE}.channels=8",
    f"{BACKBONE}.head_channels=8",
    "--data.init_args.batch_size=16",
    "--trainer.log_every_n_steps=5",
    "--timestep_loss.every_n_steps=10",
    "--gradient_conflict.every_n_steps=10",
    "--channel_activation.every_n_steps=10",
    "--samples.every_n_steps=20",
    "--samples.sampling_steps=2",
    "--samples.rows=1",
    "--model.init_args.validation.repeats=1",
    "--progress.style=off",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")


def train(config: str | Path, *arguments: str) -> int:
    path = CONFIGS / f"{config}.yaml" if isinstance(config, str) else config
    return main(["train", f"--config={path}", *SMALL, *arguments])


def runs() -> list:
    if not Path("store.db").exists():
        return []
    client = MlflowClient()
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


def checkpoints(run) -> Path:
    return Path("runs") / run.info.run_id / "checkpoints"


@pytest.mark.parametrize("method", ["baseline", "dtr"])
def test_a_unet_trains_and_samples_by_configuration_alone(method):
    steps = [
        "--trainer.max_steps=40",
        "--trainer.val_check_interval=20",
        "--model.init_args.optimization.warmup_steps=0",
    ]
    assert train(f"unet_{method}", *steps) == 0
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert run.data.tags[records.TAG_METHOD] == method
    assert run.data.params["backbone.kind"] == "unet"
    assert run.data.params["backbone.channel_mult"] == "[1, 2]"
    losses = [metric.value for metric in MlflowClient().get_metric_history(run.info.run_id, "loss/val")]
    assert losses[-1] < 0.9 * losses[0]
    assert {"conflict/rate", "activation/dead_fraction"} <= set(run.data.metrics)

    module = load_denoiser(checkpoints(run) / "last.ckpt")
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    manifest = records.RunManifest.from_json((artifacts / records.MANIFEST_PATH).read_text())
    assert manifest.block_channels == module.backbone.block_channels
    assert manifest.parameters == sum(p.numel() for p in module.backbone.parameters())
    if method == "dtr":
        masks = np.load(artifacts / records.MASKS_PATH)
        for index, (block, channels) in enumerate(manifest.block_channels.items()):
            assert masks[block].shape == (1000, channels)
            assert (masks[block] == module.backbone.routing.block_masks(index)).all()
    images = {path.name.split("+")[0] for path in (artifacts / "images").iterdir()}
    assert "samples" in images
    options = ["--steps=2", "--count=2", "--guidance-scale=2", "--out=x.png"]
    assert main(["sample", str(checkpoints(run) / "last.ckpt"), *options]) == 0
    assert Path("x.png").exists()


def test_a_resumed_unet_is_the_same_as_an_uninterrupted_one_with_its_dropout(capfd):
    every = ["--trainer.val_check_interval=5", "--checkpoint.every_n_steps=5", f"{BACKBONE}.dropout=0.3"]
    assert train("unet_dtr", *every, "--trainer.max_steps=10", "--tracking.run_name=straight") == 0
    (straight,) = runs()
    assert train("unet_dtr", *every, "--trainer.max_steps=5", "--tracking.run_name=stopped") == 0
    stopped = next(run for run in runs() if run.info.run_name == "stopped")
    half = checkpoints(stopped) / "last.ckpt"
    other = ["--trainer.max_steps=10", f"--resume={half}", f"{BACKBONE}.num_res_blocks=2"]
    assert train("unet_dtr", *every, *other) == 2
    assert "with other settings: backbone" in capfd.readouterr().err
    assert train("unet_dtr", *every, "--trainer.max_steps=10", f"--resume={half}") == 0
    assert len(runs()) == 2
    first, second = (
        torch.load(checkpoints(run) / "last.ckpt", weights_only=True)["state_dict"] for run in (straight, stopped)
    )
    for (name, p), q in zip(first.items(), second.values(), strict=True):
        assert torch.equal(p, q), name


def test_the_unet_configs_are_the_dits_but_for_the_backbone_and_differ_in_the_method_alone():
    names = ("baseline", "unet_baseline", "unet_dtr")
    loaded = {name: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in names}
    for name, config in loaded.items():
        model = config["model"]
        assert model.pop("class_path") == ("DTRModule" if name == "unet_dtr" else "BaselineModule")
        model["init_args"].pop("routing", None)
    assert loaded["unet_baseline"] == loaded["unet_dtr"]
    for config in loaded.values():
        config["model"]["init_args"].pop("backbone")
    assert loaded["baseline"] == loaded["unet_baseline"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["channels=20"], r"^dtr-lab: error: level 0 has 20 channels, no multiple of norm_groups 8: .*$"),
        (["head_channels=5"], r"^dtr-lab: error: level 1 has attention and 16 channels"),
        (["attention_resolutions=[16]"], r"^dtr-lab: error: attention_resolutions names 16"),
        (["input_size=9"], r"^dtr-lab: error: input_size 9 cannot be halved 1 times"),
        (["num_classes=5"], r"^dtr-lab: error: data set digits has 10 classes, but backbone.num_classes is 5"),
        (["input_size=16", "attention_resolutions=[8]"], "data set digits has images of 1 x 8 x 8"),
        (["channels=many"], 'key "channels":\n.*int.* Got value: many'),
        (["chanels=3"], "Option 'chanels' is not accepted"),
        (["kind=dit"], "settings of a DiT and of a U-Net are mixed"),
        (["hidden_size=32"], "settings of a DiT and of a U-Net are mixed: Option 'hidden_size'"),
    ],
)
def test_a_unets_bad_settings_are_refused_in_one_message(arguments, says, capfd):
    assert train("unet_dtr", *(f"{BACKBONE}.{argument}" for argument in arguments)) == 2
    captured = capfd.readouterr().err
    message = captured[captured.index("dtr-lab: error:") :]
    assert re.search(says, message, re.MULTILINE), message
    assert "DiTConfig" not in message
    assert "Traceback" not in captured
    assert len(message) < 600
    assert runs() == []


@pytest.mark.parametrize(
    ("base", "change", "says", "never"),
    [
        ("unet_dtr", {"channel_mult": None, "chanel_mult": [1, 2]}, "Option 'chanel_mult'", "Option 'channels'"),
        ("unet_dtr", {"channels": None}, "required: channels", "patch_size"),
        ("dtr", {"depth": None}, "required: depth", "UNetConfig"),
        ("dtr", {"depth": None, "depht": 4}, "Option 'depht'", "patch_size"),
        ("dtr", {"kind": "uent"}, "uent", "mixed"),
        ("dtr", {"channel_mult": [1, 2]}, "are mixed: .*'channel_mult'", "UNetConfig"),
    ],
)
def test_a_faulty_file_is_judged_as_the_backbone_it_means(tmp_path, base, change, says, never, capfd):
    config = yaml.safe_load((CONFIGS / f"{base}.yaml").read_text())
    backbone = config["model"]["init_args"]["backbone"]
    for key, value in change.items():
        backbone.pop(key) if value is None else backbone.update({key: value})
    path = tmp_path / "faulty.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["train", f"--config={path}"]) == 2
    message = capfd.readouterr().err
    assert re.search(says, message), message
    assert never not in message
    assert runs() == []


def test_routing_keeps_its_defaults_when_only_the_backbone_is_overridden(tmp_path):
    """A file without a routing section, and a setting of another section on the command line."""
    config = yaml.safe_load((CONFIGS / "unet_dtr.yaml").read_text())
    del config["model"]["init_args"]["routing"]
    path = tmp_path / "defaults.yaml"
    path.write_text(yaml.safe_dump(config))
    assert train(path, "--trainer.max_steps=1", "--trainer.val_check_interval=1") == 0
    assert runs()[0].data.params["routing.beta"] == "0.8"


def test_a_dit_of_the_time_before_there_were_unets_can_be_resumed(tmp_path):
    small = [f"{BACKBONE}.hidden_size=16", f"{BACKBONE}.depth=2", f"{BACKBONE}.num_heads=2", *SMALL[2:]]
    arguments = ["train", f"--config={CONFIGS / 'dtr.yaml'}", *small, "--trainer.val_check_interval=2"]
    assert main([*arguments, "--trainer.max_steps=2"]) == 0
    path = checkpoints(runs()[0]) / "last.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["hyper_parameters"]["backbone"].pop("kind") == "dit"
    torch.save(checkpoint, path)
    assert main([*arguments, "--trainer.max_steps=4", f"--resume={path}"]) == 0
    assert len(runs()) == 1
