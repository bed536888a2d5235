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
GRID = "**Grid of routings and optimisations**"
"""How the paragraph about a grid's results begins."""
_COMPARISON = "**Comparison of "
_COMPARED = "Compared in"
_NEWEST = "Newest comparison"
_RUNS = "Runs: "
_MORE = "- … and more in the report."
_MOST_LINKS = 20
_MOST_CHARACTERS = 8000  # MLflow cuts a longer tag


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
        others = _run_links(experiment_id, [member for member in members if member[0] != run_id])
        start = f"{_COMPARED} **{comparison}**"
        line = f"{start}: {links}; with {others}." if others else f"{start}: {links}."
        note = client.get_run(run_id).data.tags.get(NOTE_TAG, "")
        client.set_tag(run_id, NOTE_TAG, with_link_line(note, start, line))
    note = client.get_experiment(experiment_id).tags.get(NOTE_TAG, "")
    newest = f"{_NEWEST} {comparison} ({len(members)} runs): {links}."  # MLflow's list of experiments shows it raw
    client.set_experiment_tag(experiment_id, NOTE_TAG, with_first_paragraph(note, _NEWEST, newest))


def comparison_note(
    before: str,
    experiment_id: str,
    parent: str,
    members: Sequence[tuple[str, str]],
    methods: Sequence[str],
    findings: Sequence[str],
    warnings: Sequence[str],
) -> str:
    """The verdict as Markdown, for the description of a comparison's parent run.

    Args:
        before: Its description; an earlier verdict is replaced, everything else stays.
        experiment_id: Where the runs are.
        parent: The run that holds the report.
        members: Id and name of each compared run.
        methods: Their names.
        findings: Sentences.
        warnings: Sentences.
    """
    report = artifact_url("", experiment_id, parent, REPORT)
    compared = ", ".join(methods) if len(methods) <= _MOST_LINKS else f"{len(methods)} methods"
    first = f"{_COMPARISON}{compared}** ({len(members)} runs): [the whole report]({report})."
    last = f"{_RUNS}{_run_links(experiment_id, members)}."
    others = _without_verdict(before)
    room = _MOST_CHARACTERS - sum(len(part) + 2 for part in (first, last, *others))
    lines: list[str] = []
    for sentence in [f"- {each}" for each in findings] + [f"- **Note:** {each}" for each in warnings]:
        room -= len(sentence) + 1
        if room < len(_MORE):
            lines.append(_MORE)
            break
        lines.append(sentence)
    grid = [part for part in others if part.startswith(GRID)]
    return "\n\n".join([*grid, first, "\n".join(lines), last, *(part for part in others if part not in grid)])


def _without_verdict(note: str) -> list[str]:
    """Its paragraphs but for those of `comparison_note`."""
    kept: list[str] = []
    before = ""
    for part in (part for part in note.split("\n\n") if part.strip()):
        is_list = part.startswith("- ") and before.startswith(_COMPARISON)
        if not (is_list or part.startswith((_COMPARISON, _RUNS))):
            kept.append(part)
        before = part
    return kept


def _run_links(experiment_id: str, members: Sequence[tuple[str, str]]) -> str:
    """Their names, each leading to its page, in Markdown; of very many the first."""
    links = [f"[{name}]({run_url('', experiment_id, run_id)})" for run_id, name in members[:_MOST_LINKS]]
    more = [f"{len(members) - _MOST_LINKS} more"] * (len(members) > _MOST_LINKS)
    return ", ".join([*links, *more])


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
