"""``dtr-lab compare``: runs or an experiment -> tables, figures and one HTML page, logged to MLflow."""

from __future__ import annotations

import argparse
import functools
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.comparisons import create_comparison
from experiments.mlflow_links import REPORT
from experiments.mlflow_notes import NOTE_TAG, comparison_note, link_runs
from experiments.mlflow_view import save_view
from lightning_modules.errors import UserInputError
from lightning_modules.folders import writable_folder

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from rich.console import Console

    from analysis.report.panels import DrawnFigure
    from analysis.summary import Verdict

TABLES_DIR = "tables"
FIGURES_DIR = "figures"
_ALL = "all"
_NAMES = 6
"""Methods that a title names."""
_RUNS_AT_ONCE = 10
"""That one process makes tables of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--experiment", help="name of the MLflow experiment")
    parser.add_argument(
        "--comparison",
        default="latest",
        help="only the runs of this comparison: its id, 'latest' (default: the newest one) or 'all' runs",
    )
    parser.add_argument("--runs", nargs="+", metavar="ID", help="exactly these runs, by their MLflow run id")
    parser.add_argument("--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db here)")
    parser.add_argument("--out", type=Path, help="output folder (default: runs/comparisons/COMPARISON)")
    parser.add_argument("--include-unfinished", action="store_true", help="also runs that failed or still run")
    parser.add_argument("--pdf", action="store_true", help="figures also as PDF, for papers")
    parser.add_argument("--no-log", action="store_true", help="write the files only, log nothing to MLflow")


def run(args: argparse.Namespace) -> int:
    """Compares, and prints the summary and where the files are."""
    summary = compare(
        args.tracking_uri,
        experiment=args.experiment,
        comparison=args.comparison,
        run_ids=args.runs,
        out=args.out,
        include_unfinished=args.include_unfinished,
        pdf=args.pdf,
        log=not args.no_log,
    )
    print_summary(summary)
    return 0


def compare(
    tracking_uri: str | None = None,
    *,
    experiment: str | None = None,
    comparison: str = "latest",
    run_ids: Sequence[str] | None = None,
    out: Path | str | None = None,
    include_unfinished: bool = False,
    pdf: bool = False,
    log: bool = True,
) -> pd.DataFrame:
    """Compares training runs, writes what it finds, and logs it to MLflow.

    Written to ``out``: ``report.html``, ``tables/{summary,runs,curves,interval_losses}.csv``, ``figures/*.png``.
    Logged to the parent run of the comparison (see `comparisons.create_comparison`), which is finished by it; runs from
    several comparisons get a parent of their own.

    Args:
        tracking_uri: See `analysis.runs.locate_store`.
        experiment: Name of the experiment; needed unless ``run_ids`` are given.
        comparison: Id of a comparison, ``"latest"``, or ``"all"`` for all runs of the experiment.
        run_ids: Exactly these runs.
        out: Output folder; ``runs/comparisons/<comparison>`` by default.
        include_unfinished: Whether to take runs that are not finished too; the report says so. Runs that were not
            validated yet are left out then.
        pdf: Whether to write the figures as PDF, too.
        log: Whether to log to MLflow.

    Returns:
        `analysis.summary.summary_frame`, with ``attrs``: findings and warnings (lists of sentences), out (path), and
        run_id of the parent (empty if nothing was logged).

    Raises:
        UserInputError: If the runs cannot be loaded or compared, or ``out`` cannot be written to.
    """
    from analysis.frames import interval_losses
    from analysis.report.figures import drawn_report
    from analysis.report.page import render_report
    from analysis.runs import locate_store
    from analysis.summary import summary_frame
    from lightning_modules.tracking.store import check_store

    uri = locate_store(tracking_uri)
    check_store(uri)
    runs, specialists, left_out = _load(uri, experiment, comparison, run_ids, include_unfinished)
    name = _comparison_id(runs)
    folder = Path(out) if out is not None else Path("runs") / "comparisons" / name
    for part in (folder, folder / TABLES_DIR, folder / FIGURES_DIR):
        writable_folder(part, "--out")
    table, curves = _tabled(runs)
    summary = summary_frame(table, curves)
    said, sections = drawn_report(runs, summary, curves, specialists=specialists, pdf=pdf)
    said.warnings.extend(left_out)
    title = f"{runs[0].attrs['experiment']}: {_versus(_method_names(summary))}"
    page = render_report(runs, summary, said, table, sections, title=title)
    tables = {
        "summary": summary.reset_index(),
        "runs": table,
        "curves": curves,
        "interval_losses": interval_losses(runs),
    }
    _write(folder, tables, [figure for section in sections for figure in section.figures], page)
    parent = _log(uri, runs, name, folder, summary, said) if log else ""
    summary.attrs = {"findings": said.findings, "warnings": said.warnings, "out": str(folder), "run_id": parent}
    return summary


def print_summary(summary: pd.DataFrame, console: Console | None = None) -> None:
    """Prints a summary as returned by `compare`: the table, the verdict, and where the files are."""
    from rich.console import Console
    from rich.table import Table

    from analysis.summary import readable

    console = console or Console()
    shown = readable(summary)
    table = Table(title="Comparison", title_justify="left", title_style="bold")
    for column in shown.columns:
        # Where space is short lines break between words, and a number is never cut.
        widest = max((len(word) for cell in shown[column] for word in str(cell).split()), default=0)
        table.add_column(column, justify="right" if column else "left", overflow="fold", min_width=widest)
    for row in shown.itertuples(index=False):
        table.add_row(*row)
    if console.measure(table, options=console.options.update(width=1000)).minimum > console.width:
        table.padding = 0
    console.print(table)
    for sentence in summary.attrs.get("findings", []):
        console.print(f"• {sentence}", markup=False, highlight=False)
    for sentence in summary.attrs.get("warnings", []):
        console.print(f"! {sentence}", style="yellow", markup=False, highlight=False)
    if "out" in summary.attrs:
        folder = Path(summary.attrs["out"])
        console.print(f"Report: {folder / REPORT}", soft_wrap=True, markup=False)
        console.print(f"Figures: {folder / FIGURES_DIR}   Tables: {folder / TABLES_DIR}", soft_wrap=True, markup=False)


def _load(
    uri: str, experiment: str | None, comparison: str, run_ids: Sequence[str] | None, include_unfinished: bool
) -> tuple[list[xr.Dataset], dict[str, list[xr.Dataset]], list[str]]:
    """The runs, the specialists of each method, and what was said about those left out."""
    from analysis.runs import RunsLeftOutWarning, load_runs
    from analysis.specialists import specialists_of, usable_specialists

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RunsLeftOutWarning)
        runs = load_runs(
            uri,
            experiment=experiment,
            comparison=None if comparison == _ALL else comparison,
            run_ids=run_ids,
            include_unfinished=include_unfinished,
        )
        runs = _validated(runs, include_unfinished)
        try:
            specialists, left_out = usable_specialists(runs, specialists_of(runs, uri))
        except UserInputError as error:  # no reason not to compare the runs themselves
            specialists, left_out = {}, [f"Specialists are left out: {error}."]
    for warning in caught:
        if issubclass(warning.category, RunsLeftOutWarning):
            text = str(warning.message)
            left_out.append(text[0].upper() + text[1:] + ".")
    if len({tuple(run["t_low"].values.tolist()) for run in runs}) > 1:
        raise UserInputError(
            "the runs were measured on different timestep intervals, which cannot be compared: choose runs with the "
            "same `intervals` by --runs or --comparison"
        )
    if len({run.sizes["half"] for run in runs if "half" in run.sizes}) > 1:
        raise UserInputError(
            "the runs split their gradient probes into different numbers of halves (`gradient_conflict.halves`), so "
            "their probes cannot be pooled: choose runs with the same number by --runs or --comparison"
        )
    return runs, specialists, left_out


def _tabled(runs: Sequence[xr.Dataset]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`runs_frame` and `curves_frame` of many runs, by several processes."""
    import pandas as pd

    from analysis.forked import forked_calls
    from analysis.frames import curves_frame, runs_frame

    def frames(part: Sequence[xr.Dataset]) -> tuple[pd.DataFrame, pd.DataFrame]:
        return runs_frame(part), curves_frame(part)

    parts = [runs[first : first + _RUNS_AT_ONCE] for first in range(0, len(runs), _RUNS_AT_ONCE)]
    tables, curves = zip(*forked_calls([functools.partial(frames, part) for part in parts]), strict=True)
    return pd.concat(tables, ignore_index=True), pd.concat(curves, ignore_index=True)


def _validated(runs: Sequence[xr.Dataset], include_unfinished: bool) -> list[xr.Dataset]:
    """The runs with validation losses. Who asks for unfinished runs is warned of the others, else they are an error."""
    from analysis.runs import RunsLeftOutWarning

    validated = [run for run in runs if "val_loss" in run]
    missing = [run.attrs for run in runs if "val_loss" not in run]
    if missing and not (include_unfinished and validated):
        listed = ", ".join(f"{run['name']} ({run['run_id'][:8]})" for run in missing)
        raise UserInputError(
            f"no validation losses in {listed}: compare runs that were validated at least once, with the "
            "`timestep_loss` probe on"
        )
    for run in missing:
        warnings.warn(
            f"left out run {run['name']} ({run['run_id'][:8]}, {run['status']}): no validation yet",
            RunsLeftOutWarning,
            stacklevel=2,
        )
    return validated


def _comparison_id(runs: Sequence[xr.Dataset]) -> str:
    """The comparison that all runs belong to, or a stable name for this selection."""
    names = {run.attrs["comparison"] for run in runs}
    if len(names) == 1 and "" not in names:
        return names.pop()
    ids = "".join(sorted(run.attrs["run_id"] for run in runs))
    return f"selection-{hashlib.sha1(ids.encode()).hexdigest()[:8]}"


def _versus(names: Sequence[str]) -> str:
    return " vs. ".join(names) if len(names) <= _NAMES else f"{len(names)} methods"


def _method_names(summary: pd.DataFrame) -> list[str]:
    from analysis.methods import method_name

    return [method_name(str(method)) for method in summary.index]


def _write(folder: Path, tables: Mapping[str, pd.DataFrame], figures: Sequence[DrawnFigure], page: str) -> None:
    for name, table in tables.items():
        table.to_csv(folder / TABLES_DIR / f"{name}.csv", index=False)
    for figure in figures:
        (folder / FIGURES_DIR / f"{figure.name}.png").write_bytes(figure.png)
        if figure.pdf is not None:
            (folder / FIGURES_DIR / f"{figure.name}.pdf").write_bytes(figure.pdf)
    (folder / REPORT).write_text(page, encoding="utf-8")


def _log(uri: str, runs: Sequence[xr.Dataset], name: str, folder: Path, summary: pd.DataFrame, said: Verdict) -> str:
    """Logs the files and the verdict to the parent run of the comparison, which ends it; returns its id."""
    from lightning_modules.tracking.store import mlflow_client

    parent = create_comparison(uri, experiment=runs[0].attrs["experiment"], comparison=name)
    client = mlflow_client(uri)
    client.log_artifact(parent, str(folder / REPORT))
    client.log_artifacts(parent, str(folder / TABLES_DIR), TABLES_DIR)
    client.log_artifacts(parent, str(folder / FIGURES_DIR), FIGURES_DIR)
    parent_run = client.get_run(parent)
    experiment_id, before = parent_run.info.experiment_id, parent_run.data.tags.get(NOTE_TAG, "")
    members = [(str(run.attrs["run_id"]), str(run.attrs["name"])) for run in runs]
    note = comparison_note(before, experiment_id, parent, members, _method_names(summary), said.findings, said.warnings)
    client.set_tag(parent, NOTE_TAG, note)
    client.set_terminated(parent)
    view = save_view(client, experiment_id, name, [run_id for run_id, _ in members])
    link_runs(client, experiment_id, name, parent, members, view)
    return parent
