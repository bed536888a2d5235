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
        paragraph = f"{start}: {links}; with {others}." if others else f"{start}: {links}."
        note = client.get_run(run_id).data.tags.get(NOTE_TAG, "")
        client.set_tag(run_id, NOTE_TAG, with_paragraph(note, start, paragraph))
    note = client.get_experiment(experiment_id).tags.get(NOTE_TAG, "")
    newest = f"{_NEWEST} **{comparison}** ({len(members)} runs): {links}."
    client.set_experiment_tag(experiment_id, NOTE_TAG, with_paragraph(note, _NEWEST, newest, at=0))


def run_link(experiment_id: str, run_id: str, name: str) -> str:
    """A run's name that leads to its page, in Markdown."""
    return f"[{name}]({run_url('', experiment_id, run_id)})"


def with_paragraph(note: str, start: str, paragraph: str, at: int = 1) -> str:
    """The note with a paragraph at a place, instead of one that begins alike; what a run is comes before its links."""
    kept = [part for part in note.split("\n\n") if part.strip() and not part.startswith(start)]
    kept.insert(at, paragraph)
    return "\n\n".join(kept)
