"""Tests for `experiments/train.py`: whole small trainings, and refusals before any run exists."""

from __future__ import annotations

import http.server
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image

from experiments.__main__ import main
from lightning_modules.checkpoint import load_denoiser
from lightning_modules.tracking import records

CONFIGS = Path(__file__).parents[2] / "experiments" / "digits"
SMALL = [
    "--model.init_args.backbone.hidden_size=16",
    "--model.init_args.backbone.depth=2",
    "--model.init_args.backbone.num_heads=2",
    "--data.init_args.batch_size=16",
    "--trainer.log_every_n_steps=5",
    "--timestep_loss.every_n_steps=10",
    "--gradient_conflict.every_n_steps=10",
    "--channel_activation.every_n_steps=10",
    "--samples.every_n_steps=20",
    "--samples.sampling_steps=3",
    "--progress.style=off",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store())


def train(method: str, *arguments: str) -> int:
    return main(["train", f"--config={CONFIGS / f'{method}.yaml'}", *SMALL, *arguments])


def store() -> str:
    """The store of this test; absolute, since MLflow remembers stores by their URI."""
    return f"sqlite:///{Path.cwd() / 'store.db'}"


def runs() -> list:
    if not Path("store.db").exists():
        return []
    client = MlflowClient(store())
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


def tables(run) -> dict[str, list]:
    """All rows of a run by table, later attempts replacing what they measured again."""
    folder = Path(run.info.artifact_uri.removeprefix("file://")) / records.TELEMETRY_DIR
    rows: dict[str, list] = {}
    for table in records.TABLES:
        shards = [pq.read_table(path) for path in sorted((folder / table).glob("*.parquet"))]
        metas = [shard.schema.metadata for shard in shards]
        resumed = {int(meta[records.META_ATTEMPT]): int(meta[records.META_RESUMED_FROM]) for meta in metas}
        kept = []
        for shard in shards:
            attempt = int(shard.schema.metadata[records.META_ATTEMPT])
            limit = min([step for later, step in resumed.items() if later > attempt], default=10**9)
            kept += [row for row in shard.to_pylist() if row["step"] <= limit]
        rows[table] = kept
    return rows


def test_a_training_leaves_a_complete_run():
    assert train("dtr", "--trainer.max_steps=45", "--trainer.val_check_interval=20", "--seed_everything=3") == 0
    (run,) = runs()
    client = MlflowClient(store())
    assert run.info.status == "FINISHED"
    assert run.data.tags[records.TAG_METHOD] == "dtr"
    assert run.data.tags[records.TAG_SEED] == "3"
    assert run.data.tags[records.TAG_DATASET] == "digits"
    assert int(run.data.tags[records.TAG_PARAMETERS]) > 1000
    assert run.data.params["routing.beta"] == "0.8"
    assert run.data.params["backbone.hidden_size"] == "16"
    assert "DTR" in run.data.tags["mlflow.note.content"]
    val = client.get_metric_history(run.info.run_id, "loss/val")
    assert [metric.step for metric in val] == [20, 40, 45], "and once more at the end"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss/train")] == list(range(5, 46, 5))
    expected = {"loss/val_t000-124", "conflict/rate", "activation/dead_fraction", "optim/learning_rate"}
    assert expected | {"optim/grad_norm", "speed/steps_per_second"} <= set(run.data.metrics)
    assert not {"epoch", "step"} & set(run.data.metrics)

    rows = tables(run)
    loss = rows[records.TIMESTEP_LOSS]
    assert sum(row["count"] for row in loss if row["split"] == "train") == 45 * 16
    last = [row for row in loss if row["split"] == "val" and row["step"] == 45]
    interval = [row for row in last if row["timestep"] < 125]
    mean = sum(row["sum"] for row in interval) / sum(row["count"] for row in interval)
    assert val[-1].step == 45
    assert run.data.metrics["loss/val_t000-124"] == pytest.approx(mean, rel=1e-5)
    assert {row["step"] for row in rows[records.GRADIENT_GRAMIAN]} == {10, 20, 30, 40}
    assert {row["step"] for row in rows[records.CHANNEL_ACTIVATION]} == {10, 20, 30, 40}

    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    manifest = records.RunManifest.from_json((artifacts / records.MANIFEST_PATH).read_text())
    assert (manifest.method, manifest.seed, manifest.batch_size) == ("dtr", 3, 16)
    assert np.load(artifacts / records.MASKS_PATH)["blocks.0"].shape == (1000, 16)
    assert "beta: 0.8" in (artifacts / records.CONFIG_PATH).read_text()
    images = {path.name.split("+")[0] for path in (artifacts / "images").iterdir()}
    assert images == {"conflict_cosine", "samples"}
    assert load_denoiser(f"runs/{run.info.run_id}/checkpoints/last.ckpt").method == "dtr"


def test_a_resumed_training_is_the_same_as_an_uninterrupted_one():
    every = ["--trainer.val_check_interval=10", "--checkpoint.every_n_steps=15", "--trainer.max_steps=50"]
    assert train("random", *every, "--tracking.run_name=straight") == 0
    straight = runs()[0]
    crash = ["--trainer.callbacks+=tests.experiments.crash.CrashAt", "--trainer.callbacks.step=43"]
    with pytest.raises(RuntimeError, match="as planned"):
        train("random", *every, "--tracking.run_name=stopped", *crash)
    stopped = next(run for run in runs() if run.info.run_name == "stopped")
    folder = Path("runs") / stopped.info.run_id / "checkpoints"
    checkpoint = folder / "step-00000030.ckpt"
    assert stopped.info.status == "FAILED"
    assert train("random", *every, f"--resume={checkpoint}") == 0
    assert len(runs()) == 2, "a resumed run goes on in its own run"

    def weights(run):
        return torch.load(f"runs/{run.info.run_id}/checkpoints/last.ckpt", weights_only=True)["state_dict"]

    resumed = next(run for run in runs() if run.info.run_name == "stopped")
    assert resumed.info.status == "FINISHED"
    for (name, p), q in zip(weights(straight).items(), weights(resumed).values(), strict=True):
        assert torch.equal(p, q), name
    client = MlflowClient(store())
    for key in ("loss/train", "loss/val", "conflict/rate", "activation/dead_fraction"):
        first, second = (
            [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)] for run in (straight, resumed)
        )
        assert first == second, key
    before, after = tables(straight), tables(resumed)
    for table in (records.GRADIENT_GRAMIAN, records.CHANNEL_ACTIVATION):
        assert before[table] == after[table], table

    def pooled(rows):
        """Windows end at checkpoints, which lie elsewhere in the two runs; their sums must agree."""
        total: dict = {}
        for row in rows:
            key = (row["split"], row["quantity"], row["timestep"])
            total[key] = np.add(total.get(key, 0.0), [row["count"], row["sum"], row["sum_sq"]])
        return total

    first, second = pooled(before[records.TIMESTEP_LOSS]), pooled(after[records.TIMESTEP_LOSS])
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_allclose(second[key], value, rtol=1e-9)
    images = Path(resumed.info.artifact_uri.removeprefix("file://")) / "images"
    names = [path.name.split("+") for path in images.iterdir()]
    shown = [(name[0], name[2]) for name in names if name[-1].endswith(".png")]
    assert len(shown) == len(set(shown)), "no image is logged twice"


def test_resuming_another_experiment_is_refused(capfd):
    assert train("dtr", "--trainer.max_steps=2", "--trainer.val_check_interval=2") == 0
    (run,) = runs()
    checkpoint = f"runs/{run.info.run_id}/checkpoints/last.ckpt"
    changes = {
        "routing": "--model.init_args.routing.beta=0.5",
        "intervals": "--model.init_args.intervals.num_intervals=4",
        "loss_weight": "--model.init_args.loss_weight.name=min_snr",
        "batch_size": "--data.init_args.batch_size=32",
        "halves": "--gradient_conflict.halves=1",
        "accumulate_grad_batches": "--trainer.accumulate_grad_batches=2",
        "nothing to resume": "--trainer.max_steps=2",
    }
    for part, change in changes.items():
        assert train("dtr", "--trainer.max_steps=4", f"--resume={checkpoint}", change) == 2
        assert part in capfd.readouterr().err
    assert train("baseline", "--trainer.max_steps=4", f"--resume={checkpoint}") == 2
    assert len(runs()) == 1
    assert runs()[0].info.run_name == "dtr-seed0"


def test_a_server_that_is_not_mlflow_is_refused(tmp_path, capfd):
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def do_POST(self):
            self.send_error(404)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert train("dtr", f"--tracking.tracking_uri=http://127.0.0.1:{server.server_port}") == 2
    server.shutdown()
    assert "no MLflow server" in capfd.readouterr().err


def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path):
    """From a cold start, as a user meets it."""
    command = [sys.executable, "-m", "experiments", "train", f"--config={CONFIGS / 'dtr.yaml'}"]
    done = subprocess.run([*command, "--model.init_args.routing.beta=2"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "beta" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model.init_args.backbone.hiden_size=3"], "hiden_size"),
        (["--trainer.max_stepz=3"], "max_stepz"),
        (["--model.init_args.routing.beta=1.5"], r"beta .* \(0, 1\], got 1.5"),
        (["--model.init_args.routing.beta=0"], r"beta .* \(0, 1\], got 0"),
        (["--model.init_args.routing.beta=much"], "routing.beta"),
        (["--model.init_args.backbone.patch_size=3"], "patch_size 3 does not divide"),
        (["--model.init_args.backbone.input_size=16"], "data set digits has images of 1 x 8 x 8"),
        (["--model.init_args.backbone.num_classes=5"], "10 classes"),
        (["--model.init_args.intervals.num_intervals=0"], "0 intervals"),
        (["--model.init_args.optimization.learning_rate=-1"], "learning_rate"),
        (["--model.init_args.diffusion.schedule=quadratic"], "schedule"),
        (["--tracking.tracking_uri=foo://bar"], "unknown scheme 'foo'"),
        (["--tracking.tracking_uri=sqlite:////nowhere/x.db"], "/nowhere"),
        (["--tracking.tracking_uri=http://127.0.0.1:9"], "127.0.0.1:9"),
        (["--tracking.tracking_uri=file:///tmp/mlruns"], "migrate-filestore"),
        (["--data.class_path=ImageFolderData", "--data.init_args.root=/nowhere"], "no image folder at /nowhere"),
        (["--config=/nowhere.yaml"], "/nowhere.yaml"),
        ([f"--config={__file__}"], "test_train.py is no valid YAML"),
        ([f"--resume={__file__}"], "test_train.py is not a checkpoint of DTR Lab"),
        (["--resume=/nowhere.ckpt"], "no checkpoint at /nowhere.ckpt"),
        (["--trainer.max_steps=0"], "max_steps"),
        (["--seed_everything=-1"], "-1"),
        (["--gradient_conflict.halves=0"], "halves"),
        (["--trainer.max_step=5"], "max_step"),
        (["--tracking.run_dir=/proc/runs"], "tracking.run_dir"),
        (["--data.init_args.val_batch_size=4"], "cannot cover 8 timestep intervals"),
    ],
)
def test_bad_input_is_refused_in_one_message_and_leaves_no_run(arguments, says, capfd):
    assert train("dtr", *arguments) == 2
    captured = capfd.readouterr().err
    message = captured[captured.index("dtr-lab: error:") :]
    assert re.search(says, message), message
    assert "Traceback" not in captured
    assert len(message) < 900
    assert runs() == []
    assert not Path("runs").exists()


def test_without_data_or_model_the_missing_part_is_named(capfd):
    assert main(["train"]) == 2
    assert "required: data, model" in capfd.readouterr().err


def test_a_folder_of_images_trains_in_bf16_with_a_learned_variance(tmp_path):
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for index in range(6):
            pixels = generator.integers(0, 255, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / label / f"{index}.png")
    folder = [
        f"--data.init_args.root={tmp_path / 'pets'}",
        "--data.init_args.holdout=8",
        "--data.init_args.num_workers=0",
    ]
    config = f"--config={CONFIGS.parent / 'image_folder' / 'dtr.yaml'}"
    steps = ["--trainer.max_steps=11", "--trainer.val_check_interval=11", "--model.init_args.backbone.num_classes=2"]
    assert main(["train", config, *SMALL, *folder, *steps]) == 0
    (run,) = runs()
    assert run.data.tags[records.TAG_DATASET] == "pets"
    assert run.data.metrics["loss/val_vb"] > 0
    rows = tables(run)
    assert {row["quantity"] for row in rows[records.TIMESTEP_LOSS]} == {"mse", "vb"}
    assert {row["step"] for row in rows[records.GRADIENT_GRAMIAN]} == {10}


def test_the_demo_configs_differ_in_the_method_alone():
    """What the comparison varies must be all that varies."""
    names = ("baseline", "dtr", "random")
    loaded = {name: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in names}
    for config in loaded.values():
        config["model"].pop("class_path")
        config["model"]["init_args"].pop("routing", None)
    assert loaded["baseline"] == loaded["dtr"] == loaded["random"]
