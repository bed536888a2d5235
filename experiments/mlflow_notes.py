"""Descriptions in MLflow's user interface that lead from a run to the runs and the report it belongs with.

Links are relative to MLflow's page, so they hold wherever the server stands. Notes that a user wrote are added to,
never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.mlflow_links import REPORT, artifact_url, run_url, runs_url

if TYPE_CHECKING:
    from mlflow import MlflowClient

NOTE_TAG = "mlflow.note.content"
_COMPARED = "Compared in"
_NEWEST = "Newest comparison"


def link_runs(
    client: MlflowClient,
    experiment_id: str,
    comparison: str,
    parent: str,
    members: Sequence[tuple[str, str]],
    view: str,
) -> None:
    """Notes in every run, and in the experiment, where the comparison's report, charts and other runs are.

    Args:
        client: Of the store.
        experiment_id: Where the runs are.
        comparison: Id of the comparison.
        parent: Run that holds the report.
        members: Id and name of each compared run.
        view: Key of the comparison's saved view.
    """
    links = (
        f"[report]({artifact_url('', experiment_id, parent, REPORT)}), "
        f"[table]({runs_url('', experiment_id, comparison, view=view)}), "
        f"[charts]({runs_url('', experiment_id, comparison, view=view, charts=True)})"
    )
    for run_id, _ in members:
        others = ", ".join(run_link(experiment_id, *member) for member in members if member[0] != run_id)
        start = f"{_COMPARED} **{comparison}**"
        line = f"{start}: {links}; with {others}." if others else f"{start}: {links}."
        note = client.get_run(run_id).data.tags.get(NOTE_TAG, "")
        client.set_tag(run_id, NOTE_TAG, with_link_line(note, start, line))
    note = client.get_experiment(experiment_id).tags.get(NOTE_TAG, "")
    newest = f"{_NEWEST} {comparison} ({len(members)} runs): {links}."  # MLflow's list of experiments shows it raw
    client.set_experiment_tag(experiment_id, NOTE_TAG, with_first_paragraph(note, _NEWEST, newest))


def run_link(experiment_id: str, run_id: str, name: str) -> str:
    """A run's name that leads to its page, in Markdown."""
    return f"[{name}]({run_url('', experiment_id, run_id)})"


def with_link_line(note: str, start: str, line: str) -> str:
    """The note with a line near its top, instead of one that begins alike.

    It follows what the run is, but in the same paragraph: MLflow shows the first 100 pixels of a long description, and
    lays over all but the first two lines a veil that no link can be clicked through.
    """
    first, *others = [part for part in note.split("\n\n") if part.strip()] or [""]
    lines = [kept for kept in first.split("\n") if kept.strip() and not kept.startswith(start)]
    links = [line, *(kept for kept in lines if kept.startswith(_COMPARED))]
    words = [kept for kept in lines if not kept.startswith(_COMPARED)]
    others = [part for part in others if not part.startswith(start)]
    if len(words) > 1:  # a user's paragraph, which stays whole
        others.insert(0, "\n".join(words))
        words = []
    top = "  \n".join(part.rstrip() for part in (*words, *links))  # two blanks: a new line in Markdown
    return "\n\n".join([top, *others])


def with_first_paragraph(note: str, start: str, paragraph: str) -> str:
    """The note with a paragraph before all others, instead of one that begins alike."""
    kept = [part for part in note.split("\n\n") if part.strip() and not part.startswith(start)]
    return "\n\n".join([paragraph, *kept])
