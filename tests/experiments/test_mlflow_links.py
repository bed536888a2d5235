"""Links into MLflow, and descriptions that use them; tests/browser shows that MLflow follows them."""

from urllib.parse import parse_qs, urlsplit

import pytest

from experiments.mlflow_links import artifact_url, run_url, runs_url
from experiments.mlflow_notes import GRID, NOTE_TAG, comparison_note, link_runs, with_first_paragraph, with_link_line
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


def test_links_stand_in_the_second_line_which_mlflow_leaves_clear():
    note = "**DTR**, seed 0.\n\nA user's own words."
    first = with_link_line(note, "Compared in **c**", "Compared in **c**: one")
    assert first == "**DTR**, seed 0.  \nCompared in **c**: one\n\nA user's own words."
    again = with_link_line(first, "Compared in **c**", "Compared in **c**: two")
    assert again == first.replace("one", "two")
    both = with_link_line(again, "Compared in **d**", "Compared in **d**: x")
    assert both == again.replace("Compared in **c**", "Compared in **d**: x  \nCompared in **c**")
    assert with_link_line("", "Compared in **c**", "Compared in **c**: one") == "Compared in **c**: one"


def test_a_users_paragraph_is_not_torn_apart():
    note = "My own words,  \nin two lines.\n\nMore."
    first = with_link_line(note, "Compared in **c**", "Compared in **c**: one")
    assert first == f"Compared in **c**: one\n\n{note}"
    assert with_link_line(first, "Compared in **c**", "Compared in **c**: one") == first


def test_a_paragraph_of_its_own_is_moved_up():
    older = "**DTR**, seed 0.\n\nCompared in **c**: one\n\nMore."
    assert with_link_line(older, "Compared in **c**", "Compared in **c**: two") == (
        "**DTR**, seed 0.  \nCompared in **c**: two\n\nMore."
    )


def test_the_newest_comparison_takes_the_place_of_the_one_before():
    assert with_first_paragraph("", "Newest", "Newest: x") == "Newest: x"
    assert with_first_paragraph("Words.\n\nNewest: x", "Newest", "Newest: y") == "Newest: y\n\nWords."


def note_of(before, runs=2, sentences=3, width=20):
    members = [(f"id{k}", f"run{k}") for k in range(runs)]
    findings = [f"{k} ".ljust(width, "x") for k in range(sentences)]
    return comparison_note(before, "1", "parent", members, ["Baseline", "DTR"], findings, ["few seeds"])


def test_a_new_verdict_takes_the_place_of_the_one_before_and_leaves_the_rest():
    before = f"{GRID}: [results](x).\n\nMine.\n\n- my list"
    first = note_of(before)
    grid, head, verdict, runs, *mine = first.split("\n\n")
    assert (grid, mine) == (f"{GRID}: [results](x).", ["Mine.", "- my list"])
    assert head.startswith("**Comparison of Baseline, DTR** (2 runs): [the whole report](")
    assert verdict.splitlines()[-1] == "- **Note:** few seeds"
    assert runs == f"Runs: [run0]({run_url('', '1', 'id0')}), [run1]({run_url('', '1', 'id1')})."
    assert note_of(first) == first
    assert "9 xx" in (changed := note_of(first, sentences=10))
    assert changed.count("**Comparison of") == 1
    assert changed.endswith("\n\nMine.\n\n- my list")


def test_a_note_stays_within_what_mlflow_keeps_and_says_that_there_is_more():
    long = note_of("Mine.", runs=63, sentences=80, width=200)
    assert len(long) <= 8000
    assert "- … and more in the report." in long
    assert long.count("](#/experiments/1/runs/id") == 20
    assert "43 more." in long
    assert long.endswith("Mine.")
    assert "in the report." not in note_of("", sentences=20, width=200)


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
        assert note.startswith("**Plain denoiser**.  \nCompared in **c**: [report](#/experiments/")
        assert "/runs/parent/artifacts/report.html" in note
        assert f"[{other_name}]({run_url('', experiment, other)})" in note
        assert f"[{name}]" not in note
        assert note.count("Compared in") == 1
    note = client.get_experiment(experiment).tags[NOTE_TAG]
    assert note.startswith("Newest comparison c (2 runs): [report](")
    assert note.endswith("\n\nMy experiment.")
