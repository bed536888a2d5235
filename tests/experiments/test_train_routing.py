"""`dtr-lab train` with each kind of masks, reached by configuration alone: what is trained, kept, resumed, refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from mlflow import MlflowClient

from experiments.__main__ import main
from lightning_modules.checkpoint import load_denoiser
from lightning_modules.tracking import records

CONFIGS = Path(__file__).parents[2] / "experiments" / "digits"
ROUTING = "--model.init_args.routing"
SMALL = [
    "--data.init_args.batch_size=16",
    "--trainer.log_every_n_steps=5",
    "--trainer.val_check_interval=10",
    "--timestep_loss.every_n_steps=10",
    "--gradient_conflict.every_n_steps=10",
    "--channel_activation.every_n_steps=5",
    "--samples.every_n_steps=0",
    "--model.init_args.validation.repeats=1",
    "--model.init_args.optimization.warmup_steps=0",
    "--model.init_args.optimization.learning_rate=0.01",
    "--progress.style=off",
    "--trainer.accelerator=cpu",
]
DIT = ["--model.init_args.backbone.hidden_size=32", "--model.init_args.backbone.depth=3"]
UNET = ["--model.init_args.backbone.channels=8", "--model.init_args.backbone.head_channels=8"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")


def train(config: str | Path, *arguments: str) -> int:
    path = CONFIGS / f"{config}.yaml" if isinstance(config, str) else config
    size = UNET if "unet" in str(config) else DIT
    return main(["train", f"--config={path}", *SMALL, *size, *arguments])


def runs() -> list:
    if not Path("store.db").exists():
        return []
    client = MlflowClient()
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


def last(run) -> Path:
    return Path("runs") / run.info.run_id / "checkpoints" / "last.ckpt"


def artifacts(run) -> Path:
    return Path(run.info.artifact_uri.removeprefix("file://"))


@pytest.mark.parametrize(
    ("config", "arguments", "widths"),
    [
        ("cluster", [], [25, 25, 25]),
        ("cluster", [f"{ROUTING}.cluster_bounds=[0,200,1000]", f"{ROUTING}.beta=0.5"], [16, 16, 16]),
        ("learned", [f"{ROUTING}.per_block=true", f"{ROUTING}.beta_last=0.5"], [25, 20, 16]),
        ("dtr", [f"{ROUTING}.per_block=true", f"{ROUTING}.variant=official"], [25, 25, 25]),
        ("unet_dtr", [f"{ROUTING}.kind=cluster", f"{ROUTING}.clusters=2", f"{ROUTING}.beta=0.75"], None),
        ("unet_dtr", [f"{ROUTING}.kind=learned", f"{ROUTING}.clusters=3"], None),
    ],
)
def test_every_kind_trains_and_leaves_its_masks(config, arguments, widths):
    assert train(config, "--trainer.max_steps=10", *arguments) == 0
    (run,) = runs()
    assert run.info.status == "FINISHED"
    module = load_denoiser(last(run))
    manifest = records.RunManifest.from_json((artifacts(run) / records.MANIFEST_PATH).read_text())
    assert manifest.routing is not None
    assert run.data.params["routing.kind"] == manifest.routing["kind"]
    masks = np.load(artifacts(run) / records.MASKS_PATH)
    assert list(masks) == list(manifest.block_channels)
    for index, mask in enumerate(masks.values()):
        assert (mask == module.backbone.routing.block_masks(index)).all(), "those of the weights at the end"
        if widths is not None:
            assert set(mask.sum(1)) == {widths[index]}
    assert manifest.parameters == sum(p.numel() for p in module.backbone.parameters() if p.requires_grad)
    shards = (artifacts(run) / records.TELEMETRY_DIR / records.GRADIENT_GRAMIAN).glob("*.parquet")
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    assert {row["coverage"] for row in rows} == {1.0}
    tables = {row["layer"] for row in rows if row["layer"].startswith("routing.")}
    assert len(tables) == len(module.backbone.routing.learned)
    assert main(["sample", str(last(run)), "--steps=2", "--count=2", "--out=x.png"]) == 0


def test_lists_and_nulls_come_out_of_yaml_as_they_went_in(tmp_path):
    settings = {
        "kind": "learned",
        "clusters": 4,
        "cluster_bounds": [0, 100, 1000],
        "beta": 0.75,
        "beta_last": None,
        "temperature": 0.5,
        "seed": 3,
    }
    config = yaml.safe_load((CONFIGS / "learned.yaml").read_text())
    config["model"]["init_args"]["routing"] = settings
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    assert train(tmp_path / "mine.yaml", "--trainer.max_steps=1") == 0
    (run,) = runs()
    defaults = {"alpha": 4.0, "variant": "paper", "per_block": False}
    kept = yaml.safe_load((artifacts(run) / records.CONFIG_PATH).read_text())
    written = {name: value for name, value in settings.items() if value is not None}
    assert kept["model"]["init_args"]["routing"] == {**defaults, **written}
    manifest = records.RunManifest.from_json((artifacts(run) / records.MANIFEST_PATH).read_text())
    assert manifest.routing == {**defaults, **settings}
    assert run.data.params["routing.cluster_bounds"] == "[0, 100, 1000]"
    assert run.data.params["routing.beta_last"] == "null"
    config["model"]["init_args"]["routing"] = {**settings, "kind": "cluster", "cluster_bounds": None, "beta_last": 0.5}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    assert train(tmp_path / "other.yaml", "--trainer.max_steps=1") == 0
    routing = load_denoiser(last(runs()[0])).routing_config
    assert (routing.kind, routing.num_clusters, routing.beta_last) == ("cluster", 4, 0.5)


def test_a_resumed_run_with_learned_masks_is_the_same_as_an_uninterrupted_one():
    every = ["--checkpoint.every_n_steps=5", f"{ROUTING}.clusters=4"]
    assert train("learned", *every, "--trainer.max_steps=10", "--tracking.run_name=straight") == 0
    (straight,) = runs()
    assert train("learned", *every, "--trainer.max_steps=5", "--tracking.run_name=stopped") == 0
    stopped = next(run for run in runs() if run.info.run_name == "stopped")
    halfway = np.load(artifacts(stopped) / records.MASKS_PATH)["blocks.0"]
    assert train("learned", *every, "--trainer.max_steps=10", f"--resume={last(stopped)}") == 0
    assert len(runs()) == 2
    first, second = (torch.load(last(run), weights_only=True)["state_dict"] for run in (straight, stopped))
    assert "backbone.routing.learned.c32.logits" in first
    assert "ema.module.routing.learned.c32.logits" in first
    for (name, p), q in zip(first.items(), second.values(), strict=True):
        assert torch.equal(p, q), name
    ended = [np.load(artifacts(run) / records.MASKS_PATH)["blocks.0"] for run in (straight, stopped)]
    assert (ended[0] == ended[1]).all()
    assert (ended[1] != halfway).any(), "written again at the end of each attempt"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["kind=spiral"], "routing.kind"),
        (["beta=0.1"], "routing beta = 0.1 is too low for 8 clusters"),
        (["beta=0.99"], "none of 32 channels to each of 8 clusters"),
        (["clusters=40", "beta=0.1"], "none of 32 channels to each of 40 clusters"),
        (["beta_last=2"], "routing beta_last is the share"),
        (["cluster_bounds=[0,100,900]"], "routing cluster_bounds must end at T = 1000"),
        (["cluster_bounds=[100,1000]"], "routing cluster_bounds must start at 0"),
        (["cluster_bounds=[0,a,1000]"], "routing.cluster_bounds"),
        (["kind=dtr", "cluster_bounds=[0,100,1000]"], "cluster_bounds are for cluster and learned masks"),
        (["kind=learned", "temperature=-1"], "routing temperature must be positive"),
    ],
)
def test_bad_masks_are_refused_before_any_run_exists(arguments, says, capfd):
    assert train("cluster", *(f"{ROUTING}.{argument}" for argument in arguments)) == 2
    captured = capfd.readouterr().err
    message = captured[captured.index("dtr-lab: error:") :]
    assert re.search(says, message), message
    assert "Traceback" not in captured
    assert runs() == []


def test_the_configs_of_all_kinds_differ_in_the_routing_alone():
    loaded = [yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("dtr", "cluster", "learned")]
    kinds = [config["model"]["init_args"].pop("routing")["kind"] for config in loaded]
    assert kinds == ["dtr", "cluster", "learned"]
    assert loaded[0] == loaded[1] == loaded[2]
