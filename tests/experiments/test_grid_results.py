"""Tests for `experiments/grid_results.py`: a whole grid, one with gaps, and what MLflow has of it."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from experiments import grid_results
from experiments.comparisons import create_comparison
from experiments.grid_results import write_results
from experiments.sample_fidelity import BIAS, METRICS, TAG_FIDELITY
from lightning_modules.errors import UserInputError
from lightning_modules.tracking import records
from tests.analysis import synthetic

AXES = {"routing": ["plain", "random", "dtr"], "optimisation": ["uniform", "min_snr", "p2"]}
METHODS = {"plain": "baseline", "random": "random", "dtr": "dtr"}
COMMAND = "dtr-lab sweep --config grid.yaml"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three routings with uniform and Min-SNR weights, three seeds; one run failed, one never ended, P2 is missing."""
    folder = tmp_path_factory.mktemp("grid")
    uri = synthetic.make_store(folder, seeds=0)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(synthetic.EXPERIMENT).experiment_id
    for routing, method in METHODS.items():
        for optimisation in ("uniform", "min_snr"):
            for seed in range(3):
                status = {("dtr", "min_snr", 2): "FAILED", ("random", "min_snr", 1): "RUNNING"}
                ended = status.get((routing, optimisation, seed), "FINISHED")
                run = synthetic.add_run(client, experiment, method, seed, comparison="grid", status=ended)
                client.set_tag(run, records.TAG_CELL, f"routing={routing},optimisation={optimisation}")
                client.set_tag(run, records.TAG_GIT_COMMIT, "0123456789abcdef")
    return uri


def results(uri, out, **changed):
    arguments = {"experiment": synthetic.EXPERIMENT, "comparison": "grid", "axes": AXES, "out": out, "command": COMMAND}
    write_results(uri, **(arguments | changed))
    return (out / "RESULTS.md").read_text()


def parent_of(uri):
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(create_comparison(uri, experiment=synthetic.EXPERIMENT, comparison="grid"))
    return client, run


def test_an_incomplete_grid_has_tables_figures_and_words_with_its_gaps(store, tmp_path):
    page = results(store, tmp_path)
    assert "3 routings x 3 optimisations x 3 seeds (0, 1, 2): 16 of 27 runs finished." in page
    assert "| P2 | – | – | – |" in page
    assert "(2 of 3 seeds)" in page
    assert "DTR with Min-SNR (seed 2)" in page
    assert "Random routing with Min-SNR (seed 1)" in page
    assert "Plain with P2" in page
    assert "Did not finish: dtr-2 (FAILED), random-1 (RUNNING)." in page
    assert f"```\n{COMMAND}\n```" in page
    assert "code at commit 0123456789ab." in page
    assert "samples were not measured" in page
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert set(re.findall(r"\(figures/([^)]+)\)", page)) == figures
    cells = pd.read_csv(tmp_path / "tables" / "grid_cells.csv")
    own = cells[(cells["quantity"] == "val_loss") & (cells["routing"] == "dtr") & (cells["optimisation"] == "uniform")]
    truth = [synthetic.val_loss("dtr", seed, 1000).mean() for seed in range(3)]
    assert own["mean"].item() == pytest.approx(sum(truth) / 3)
    table = pd.read_csv(tmp_path / "tables" / "grid_val_loss.csv", index_col="optimisation")
    assert table.loc["uniform", "dtr_minus_plain"] < 0 < table.loc["uniform", "random_minus_plain"]
    assert table.loc["p2"].drop(["plain_seeds", "random_seeds", "dtr_seeds"]).isna().all()


def test_all_of_it_is_logged_to_the_parent_of_the_comparison(store, tmp_path):
    results(store, tmp_path)
    client, parent = parent_of(store)
    artifacts = {
        Path(item.path).name
        for folder in ("grid", "grid/figures", "grid/tables")
        for item in client.list_artifacts(parent.info.run_id, folder)
    }
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert artifacts == written | {"figures", "tables"}
    assert parent.info.status == "FINISHED"  # it had no parent before
    note = parent.data.tags["mlflow.note.content"]
    assert f"/runs/{parent.info.run_id}/artifacts/grid/RESULTS.md" in note
    results(store, tmp_path)
    assert parent_of(store)[1].data.tags["mlflow.note.content"] == note


def test_a_parent_that_runs_is_not_ended(tmp_path):
    uri = synthetic.make_store(tmp_path, seeds=1, methods=("baseline", "dtr"))
    create_comparison(uri, experiment=synthetic.EXPERIMENT, comparison=synthetic.COMPARISON)
    results(uri, tmp_path / "out", comparison=synthetic.COMPARISON, axes={})
    client = MlflowClient(tracking_uri=uri)
    parent = create_comparison(uri, experiment=synthetic.EXPERIMENT, comparison=synthetic.COMPARISON)
    assert client.get_run(parent).info.status == "RUNNING"
    page = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "|  | Plain | DTR |" in page  # from the methods
    assert "One seed: " in page


def test_measures_of_samples_are_a_table_and_runs_measured_unlike_are_told(store, tmp_path):
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name(synthetic.EXPERIMENT).experiment_id
    runs = client.search_runs([experiment], filter_string="tags.`dtr.kind` = 'training'")
    for place, run in enumerate(runs):
        metrics = [Metric(name, 1.0 + place, 0, 0) for name in (*METRICS, BIAS)]
        client.log_batch(run.info.run_id, metrics=metrics)
        client.set_tag(run.info.run_id, TAG_FIDELITY, "1000 samples, like this")
    page = results(store, tmp_path)
    assert "## Samples" in page
    assert "1000 samples, like this; averaged weights" in page
    assert "Fréchet distance (pixels):" in page
    assert "figures/grid_fidelity.png" in page
    assert "not measured alike" not in page
    finished = next(run for run in runs if run.info.status == "FINISHED")
    client.set_tag(finished.info.run_id, TAG_FIDELITY, "30 samples, like that")
    assert "not measured alike" in results(store, tmp_path)


def test_samples_are_measured_first_if_asked_for(store, tmp_path, monkeypatch):
    asked = []

    def noted(uri, **arguments):
        asked.append(arguments)
        return ["dtr-1: no checkpoint"]

    monkeypatch.setattr(grid_results, "measure_comparison", noted)
    page = results(store, tmp_path, run_dir=tmp_path / "runs", samples=40)
    assert [(each["samples"], each["comparison"]) for each in asked] == [(40, "grid")]
    assert "- dtr-1: no checkpoint" in page


def test_runs_without_validation_are_left_out_aloud_or_refused(tmp_path):
    uri = synthetic.make_store(tmp_path, seeds=1, methods=("baseline", "dtr"))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(synthetic.EXPERIMENT).experiment_id

    def bare(comparison):
        run = client.get_run(synthetic.add_run(client, experiment, "random", 0, comparison=comparison))
        for shard in (Path(run.info.artifact_uri) / "telemetry" / records.TIMESTEP_LOSS).iterdir():
            shard.unlink()

    bare(synthetic.COMPARISON)
    page = results(uri, tmp_path / "out", comparison=synthetic.COMPARISON, axes={})
    assert "Left out for want of a validation (probe `timestep_loss`): random-0." in page
    bare("bare")
    with pytest.raises(UserInputError, match="has a validation loss"):
        results(uri, tmp_path / "out", comparison="bare")


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(store, tmp_path, monkeypatch):
    monkeypatch.setattr(grid_results, "_load", lambda *_: pytest.fail("work was done"))
    (tmp_path / "file").touch()
    with pytest.raises(UserInputError, match="file"):
        results(store, tmp_path / "file")
