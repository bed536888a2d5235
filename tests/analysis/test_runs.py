import math
import shutil
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from analysis import frames
from analysis.runs import _load, _telemetry_folder, load_runs, locate_store, metric_curves
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from tests.analysis import synthetic


@pytest.fixture(scope="module")
def mixed_store(tmp_path_factory):
    """Two comparisons, the newer with a killed run and a run without telemetry; URI and ids by name."""
    folder = tmp_path_factory.mktemp("mixed")
    uri = synthetic.make_store(folder, seeds=1, methods=("baseline",))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(synthetic.EXPERIMENT).experiment_id
    empty = client.create_experiment("empty", artifact_location=str(folder / "empty"))
    hollow = client.create_experiment("hollow", artifact_location=str(folder / "hollow"))
    add = {
        "finished": synthetic.add_run(client, experiment, "dtr", 5, comparison="c-two"),
        "killed": synthetic.add_run(client, experiment, "dtr", 6, comparison="c-two", status="KILLED"),
        "bare": synthetic.add_run(client, experiment, "dtr", 7, comparison="c-two", telemetry=False),
        "hollow": synthetic.add_run(client, hollow, "dtr", 8, comparison="c-two", telemetry=False),
        "report": client.create_run(empty, run_name="report").info.run_id,
    }
    return uri, add


def test_loads_every_run_with_its_attributes(runs):
    assert [(run.attrs["method"], run.attrs["seed"]) for run in runs] == [
        (method, seed) for method in ("baseline", "dtr", "random") for seed in range(3)
    ]
    attrs = runs[3].attrs
    assert (attrs["name"], attrs["experiment"], attrs["comparison"]) == ("dtr-0", synthetic.EXPERIMENT, "c-one")
    assert attrs["status"] == "FINISHED"
    assert "mask" in runs[3]
    assert "mask" not in runs[0]


def test_unfinished_and_hollow_runs_are_left_out_aloud(mixed_store):
    uri, _ = mixed_store
    with pytest.warns(UserWarning, match="left out") as caught:
        found = load_runs(uri, experiment=synthetic.EXPERIMENT)
    assert [run.attrs["name"] for run in found] == ["baseline-0", "dtr-5"]
    said = " ".join(str(warning.message) for warning in caught)
    assert "dtr-6 (KILLED)" in said
    assert "dtr-7" in said
    with pytest.warns(UserWarning, match="no telemetry"):
        found = load_runs(uri, experiment=synthetic.EXPERIMENT, include_unfinished=True)
    assert [run.attrs["status"] for run in found] == ["FINISHED", "FINISHED", "KILLED"]


@pytest.mark.filterwarnings("ignore:left out")
def test_selection_by_comparison_and_run_id(mixed_store):
    uri, ids = mixed_store
    for comparison, names in (("latest", ["dtr-5"]), ("c-one", ["baseline-0"])):
        found = load_runs(uri, experiment=synthetic.EXPERIMENT, comparison=comparison)
        assert [run.attrs["name"] for run in found] == names
    found = load_runs(uri, run_ids=[ids["killed"]])
    assert found[0].attrs["status"] == "KILLED"


def test_wrong_names_list_what_exists(mixed_store):
    uri, ids = mixed_store
    with pytest.raises(UserInputError, match=r"no experiment 'digits'.*'digits-demo'"):
        load_runs(uri, experiment="digits")
    with pytest.raises(UserInputError, match=r"no comparison 'c-3'.*'c-two', 'c-one'"):
        load_runs(uri, experiment=synthetic.EXPERIMENT, comparison="c-3")
    with pytest.raises(UserInputError, match="no run 'abc'"):
        load_runs(uri, run_ids=["abc"])
    with pytest.raises(UserInputError, match="not a training run or probe"):
        load_runs(uri, run_ids=[ids["report"]])
    with pytest.raises(UserInputError, match="no training runs"):
        load_runs(uri, experiment="empty")
    with pytest.raises(UserInputError, match="name an experiment or run ids"):
        load_runs(uri)
    with pytest.warns(UserWarning, match="no telemetry"), pytest.raises(UserInputError, match="dtr-lab train"):
        load_runs(uri, experiment="hollow")


@pytest.mark.filterwarnings("ignore:left out")
def test_unfinished_runs_are_counted_when_no_other_is_left(tmp_path):
    uri = synthetic.make_store(tmp_path, seeds=0)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(synthetic.EXPERIMENT).experiment_id
    for seed, status in enumerate(("RUNNING", "FAILED", "RUNNING")):
        synthetic.add_run(client, experiment, "dtr", seed, status=status)
    said = r"none of the 3 training runs .*left out 3 unfinished \(1 FAILED, 2 RUNNING\).*--include-unfinished"
    with pytest.raises(UserInputError, match=said):
        load_runs(uri, experiment=synthetic.EXPERIMENT)
    assert len(load_runs(uri, experiment=synthetic.EXPERIMENT, include_unfinished=True)) == 3


def test_missing_stores_are_not_created(tmp_path, monkeypatch):
    with pytest.raises(UserInputError, match="no MLflow store at"):
        load_runs(f"sqlite:///{tmp_path}/other.db", experiment="x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserInputError, match="migrate-filestore"):
        locate_store("./mlruns")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UserInputError, match="no MLflow server answers"):
        locate_store(f"http://127.0.0.1:{port}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserInputError, match="make demo"):
        locate_store()


def test_store_is_found_upwards(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert locate_store() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert locate_store(None) == f"sqlite:///{tmp_path}/mlflow.db"


def test_local_artifacts_are_read_in_place_also_with_blanks_in_their_path(tmp_path):
    folder = tmp_path / "my artifacts"
    folder.mkdir()
    uri = synthetic.make_store(tmp_path, seeds=1, methods=("baseline",))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("blank", artifact_location=folder.as_uri())
    run = client.get_run(synthetic.add_run(client, experiment, "dtr", 0, telemetry=False))
    assert run.info.artifact_uri.startswith("file://")
    with _telemetry_folder(client, run) as found:
        assert found.parent.parent.parent == folder
        synthetic.write_telemetry(found, "dtr", 0)
    assert load_runs(uri, experiment="blank")[0].attrs["method"] == "dtr"


class Remote:
    """A store whose artifacts lie elsewhere: below a folder, by run."""

    def __init__(self, folder):
        self.folder = folder

    def list_artifacts(self, run_id):
        return [SimpleNamespace(path="config.yaml"), SimpleNamespace(path="telemetry")]

    def download_artifacts(self, run_id, path, destination):
        shutil.copytree(self.folder / run_id / path, Path(destination) / path)


def remote_run(folder):
    synthetic.write_telemetry(folder / "r1" / "telemetry", "dtr", 0)
    info = SimpleNamespace(
        artifact_uri="mlflow-artifacts:/1/r1/artifacts", run_id="r1", run_name="one", status="FINISHED", start_time=0
    )
    return SimpleNamespace(info=info, data=SimpleNamespace(tags={}, metrics={}))


def test_remote_artifacts_are_downloaded_and_not_left_behind(tmp_path):
    with _telemetry_folder(Remote(tmp_path), remote_run(tmp_path)) as folder:
        assert (folder / "manifest.json").is_file()
        assert tmp_path not in folder.parents
    assert not folder.exists()


def test_a_downloaded_run_needs_its_download_no_more(tmp_path):
    run = _load(Remote(tmp_path), remote_run(tmp_path), "elsewhere")
    assert run.attrs["experiment"] == "elsewhere"
    assert run["activation_active_fraction"].sel(site="input").notnull().all()


def test_runs_are_read_side_by_side_and_in_order(store, runs, monkeypatch):
    both = threading.Barrier(2, timeout=20)

    def read(client, run, experiment):
        both.wait()  # passes only if two are on their way at once
        return _load(client, run, experiment)

    monkeypatch.setattr("analysis.runs._load", read)
    ids = [run.attrs["run_id"] for run in runs[:4]]
    found = load_runs(store, run_ids=ids[::-1])
    assert [run.attrs["run_id"] for run in found] == ids
    assert all(one.equals(other) for one, other in zip(found, runs, strict=False))


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Two runs with metrics of their user: URI and datasets."""
    uri = synthetic.make_store(tmp_path_factory.mktemp("scored"), seeds=1, methods=("baseline", "dtr"))
    client = MlflowClient(tracking_uri=uri)
    runs = load_runs(uri, experiment=synthetic.EXPERIMENT)
    for run, scale in zip(runs, (1.0, 0.5), strict=True):
        points = [Metric("fid", scale * 100 / step, step, step) for step in (100, 300, 200)]
        # A resumed run measured steps 200 and 300 once more; the last of them diverged.
        points += [Metric("fid", scale * 7.0, 900, 200), Metric("fid", math.nan, 901, 300)]
        points += [Metric("loss/val", scale, 1, 100), Metric("loss/train", -math.inf, 1, 100)]
        client.log_batch(run.attrs["run_id"], metrics=points)
    client.log_metric(runs[1].attrs["run_id"], "inception score", 9.0, step=300)
    return uri, runs


def test_metrics_come_as_logged_the_later_attempt_first(scored):
    uri, runs = scored
    curves = metric_curves(runs, "fid", uri)
    assert list(curves.columns) == frames.CURVE_COLUMNS
    own = curves[curves["run"] == runs[1].attrs["run_id"]]
    assert own["step"].tolist() == [100, 200, 300]
    np.testing.assert_array_equal(own["value"], [0.5, 3.5, np.nan])
    assert set(own["method"]) == {"dtr"}
    assert curves["metric"].unique().tolist() == ["fid"]


def test_patterns_choose_metrics_and_none_takes_all(scored):
    uri, runs = scored
    curves = metric_curves(runs, ["loss/*", "fid", "loss/val"], uri)
    assert (
        curves.groupby("run", sort=False)["metric"].unique().map(list).tolist()
        == [["fid", "loss/train", "loss/val"]] * 2
    )
    assert (curves.loc[curves["metric"] == "loss/train", "value"] == -np.inf).all()
    every = metric_curves(runs, tracking_uri=uri)
    assert len(every) == len(curves) + 1  # the inception score of one of them
    assert metric_curves([], "fid", uri).columns.tolist() == frames.CURVE_COLUMNS


def test_long_histories_are_whole(tmp_path):
    uri = synthetic.make_store(tmp_path, seeds=1, methods=("baseline",))
    (run,) = load_runs(uri, experiment=synthetic.EXPERIMENT)
    client = MlflowClient(tracking_uri=uri)
    for start in range(0, 3000, 1000):
        points = [Metric("fid", float(step), step, step) for step in range(start, start + 1000)]
        client.log_batch(run.attrs["run_id"], metrics=points)
    assert metric_curves([run], "fid", uri)["value"].tolist() == list(range(3000))


def test_a_run_without_the_metric_is_named_with_similar_ones(scored):
    uri, runs = scored
    with pytest.raises(UserInputError, match=r"run baseline-0 \(.{8}\) has no metric 'inception score'; it has "):
        metric_curves(runs, "inception score", uri)
    with pytest.raises(UserInputError, match=r"no metric 'los/val'; it has 'loss/val'"):
        metric_curves(runs, "los/val", uri)
    with pytest.raises(UserInputError, match=r"no metric 'FID\*'; it has 'fid', 'loss/train', 'loss/val'"):
        metric_curves(runs[:1], "FID*", uri)
    stranger = runs[0].assign_attrs(run_id="abc")
    with pytest.raises(UserInputError, match="no run 'abc' in this store"):
        metric_curves([stranger], "fid", uri)


def test_cells_of_a_sweep_and_measures_of_samples_come_with_the_run(tmp_path):
    uri = synthetic.make_store(tmp_path, seeds=2, methods=("baseline",))
    client = MlflowClient(tracking_uri=uri)
    first, other = (run.attrs["run_id"] for run in load_runs(uri, experiment=synthetic.EXPERIMENT))
    client.set_tag(first, records.TAG_CELL, "routing=plain,optimisation=p2")
    for step, value in ((1, 9.0), (2, 0.5)):
        client.log_metric(first, "fidelity/frechet_pixels", value, step=step)
    client.log_metric(first, "fidelity/kernel_pixels", math.inf)
    client.log_metric(first, "loss/train", 3.0)
    runs = {run.attrs["run_id"]: run.attrs for run in load_runs(uri, experiment=synthetic.EXPERIMENT)}
    assert runs[first]["cell"] == "routing=plain,optimisation=p2"
    assert runs[first]["fidelity"] == {"frechet_pixels": 0.5, "kernel_pixels": math.inf}
    assert (runs[other]["cell"], runs[other]["fidelity"]) == ("", {})
