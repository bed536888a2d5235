"""What a saved view says; tests/browser shows that MLflow understands it."""

import base64
import json
import zlib

import numpy as np
import pytest

from experiments.mlflow_view import TAG_PREFIX, comparison_filter, save_view, view_state
from lightning_modules.tracking.store import ensure_experiment, mlflow_client


@pytest.fixture
def client(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow_client(uri)
    ensure_experiment(client, uri, "digits")
    return client


def log_images(client, experiment_id: str, steps_by_key: dict[str, list[int]]) -> str:
    run_id = client.create_run(experiment_id).info.run_id
    for key, steps in steps_by_key.items():
        for step in steps:
            client.log_image(run_id, np.zeros((4, 4, 3), np.uint8), key=key, step=step)
    return run_id


def test_a_view_starts_at_the_last_step_that_all_runs_share(client):
    experiment_id = client.get_experiment_by_name("digits").experiment_id
    runs = [
        log_images(client, experiment_id, {"conflict_cosine": [0, 50, 100], "samples": [10]}),
        log_images(client, experiment_id, {"conflict_cosine": [0, 50], "samples": [20]}),
        log_images(client, experiment_id, {}),
    ]
    key = save_view(client, experiment_id, "a comparison: é", runs)
    view = json.loads(client.get_experiment(experiment_id).tags[TAG_PREFIX + key])
    state = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
    steps = {chart["imageKeys"][0]: chart["step"] for chart in state["compareRunCharts"] if chart["type"] == "IMAGE"}
    assert steps == {"conflict_cosine": 50, "samples": 20}  # no step in common: the last one there is
    assert view["name"] == "comparison a comparison: é"


def test_saving_again_replaces_the_view_and_leaves_others(client):
    experiment_id = client.get_experiment_by_name("digits").experiment_id
    first = save_view(client, experiment_id, "one", [])
    assert save_view(client, experiment_id, "one", []) == first
    assert save_view(client, experiment_id, "two", []) != first
    views = [tag for tag in client.get_experiment(experiment_id).tags if tag.startswith(TAG_PREFIX)]
    assert len(views) == 2


def test_every_chart_stands_in_a_section_that_exists():
    state = view_state("c", {"conflict_cosine": 3, "unknown": 4})
    sections = [section["uuid"] for section in state["compareRunSections"]]
    charts = state["compareRunCharts"]
    assert {chart["metricSectionId"] for chart in charts} == set(sections) - {"dtr-section-more-images"}
    assert len({chart["uuid"] for chart in charts}) == len(charts)
    assert [chart["imageKeys"] for chart in charts if chart["type"] == "IMAGE"] == [["conflict_cosine"]]


def test_a_view_of_all_runs_filters_none(client):
    experiment_id = client.get_experiment_by_name("digits").experiment_id
    assert save_view(client, experiment_id, None, []) != save_view(client, experiment_id, "c", [])
    assert view_state(None, {})["searchFilter"] == ""


def test_the_filter_finds_a_comparison_with_an_apostrophe(client):
    experiment_id = client.get_experiment_by_name("digits").experiment_id
    for name in ("ann's", "bob"):
        client.create_run(experiment_id, tags={"dtr.comparison": name}, run_name=name)
    found = client.search_runs([experiment_id], filter_string=comparison_filter("ann's"))
    assert [run.info.run_name for run in found] == ["ann's"]


def test_every_column_has_its_place_and_its_width():
    state = view_state("c", {})
    assert set(state["selectedColumns"]) <= set(state["columnOrder"])
    assert set(state["columnOrder"]) == set(state["columnWidths"])
