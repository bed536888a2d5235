"""Links into MLflow, and descriptions that use them; tests/browser shows that MLflow follows them."""

from urllib.parse import parse_qs, urlsplit

import pytest

from experiments.mlflow_links import artifact_url, run_url, runs_url
from experiments.mlflow_notes import NOTE_TAG, link_runs, with_paragraph
from lightning_modules.tracking.store import ensure_experiment, mlflow_client


def fragment_query(url: str) -> dict[str, list[str]]:
    return parse_qs(urlsplit(urlsplit(url).fragment).query)


def test_runs_are_filtered_by_their_comparison():
    url = runs_url("http://127.0.0.1:5000/", "7", "demo & co")
    assert url.startswith("http://127.0.0.1:5000/#/experiments/7/runs?")
    query = fragment_query(url)
    assert query["searchFilter"] == ["tags.`dtr.comparison` = 'demo & co'"]
    assert query["workflowType"] == ["machine_learning"]
    assert query["compareRunsMode"] == ["TABLE"]
    assert "searchFilter" not in fragment_query(runs_url("http://h", "7", None))


def test_an_apostrophe_is_quoted():
    query = fragment_query(runs_url("http://h", "7", "ann's"))
    assert query["searchFilter"] == ['tags.`dtr.comparison` = "ann\'s"']


def test_a_view_brings_its_own_filter():
    query = fragment_query(runs_url("http://h", "7", "c", view="key", charts=True))
    assert query["viewStateShareKey"] == ["key"]
    assert query["compareRunsMode"] == ["CHART"]
    assert "searchFilter" not in query


@pytest.mark.parametrize(
    "link", [runs_url("", "7", "c"), run_url("", "7", "r"), artifact_url("", "7", "r", "a b.html")]
)
def test_without_a_base_links_are_relative_to_mlflows_page(link):
    assert link.startswith("#/experiments/7/")
    assert fragment_query(link)["workflowType"] == ["machine_learning"]
    assert " " not in link


def test_a_paragraph_takes_the_place_of_one_that_begins_alike():
    note = "**DTR**, seed 0.\n\nA user's own words."
    first = with_paragraph(note, "Compared in **c**", "Compared in **c**: one")
    assert first == "**DTR**, seed 0.\n\nCompared in **c**: one\n\nA user's own words."
    again = with_paragraph(first, "Compared in **c**", "Compared in **c**: two")
    assert again == first.replace("one", "two")
    assert with_paragraph(again, "Compared in **d**", "Compared in **d**: x").count("Compared in") == 2
    assert with_paragraph("", "Newest", "Newest: x", at=0) == "Newest: x"


def test_every_run_leads_to_the_report_and_to_the_others(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow_client(uri)
    experiment = ensure_experiment(client, uri, "digits")
    notes = {NOTE_TAG: "**Plain denoiser**."}
    runs = [client.create_run(experiment, run_name=name, tags=notes).info for name in ("plain", "routed")]
    members = [(run.run_id, run.run_name) for run in runs]
    client.set_experiment_tag(experiment, NOTE_TAG, "My experiment.")
    for _ in range(2):  # a second report changes nothing
        link_runs(client, experiment, "c", "parent", members, "view")
    for (own, name), (other, other_name) in (members, members[::-1]):
        note = client.get_run(own).data.tags[NOTE_TAG]
        assert note.startswith("**Plain denoiser**.\n\nCompared in **c**: [report](#/experiments/")
        assert "/runs/parent/artifacts/report.html" in note
        assert f"[{other_name}]({run_url('', experiment, other)})" in note
        assert f"[{name}]" not in note
        assert note.count("Compared in") == 1
    note = client.get_experiment(experiment).tags[NOTE_TAG]
    assert note.startswith("Newest comparison **c** (2 runs): [report](")
    assert note.endswith("\n\nMy experiment.")
