"""What `dtr-lab affinity` says about a checkpoint: tables, pictures for MLflow, and a few sentences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

from analysis.affinity import significant_cells
from analysis.reading.telemetry import read_telemetry
from analysis.representation import representation_affinity
from analysis.significance import FALSE_DISCOVERY_RATE
from analysis.transfer import fine_tuning_affinity, first_order_slope, look_ahead_affinity
from experiments.measuring.record import AffinityRecord
from lightning_modules.tracking import records
from lightning_modules.tracking.heatmap import heatmap_image
from lightning_modules.tracking.records import FINE_TUNING, LOOK_AHEAD, REPRESENTATION

TITLES = {
    LOOK_AHEAD: "Look-ahead: loss saved",
    FINE_TUNING: "Fine-tuning: loss saved",
    REPRESENTATION: "CKA, mean over blocks",
}
_PICTURES = {
    LOOK_AHEAD: "Look-ahead / own",
    FINE_TUNING: "Fine-tuning / own",
    REPRESENTATION: "CKA",
}
"""Of pictures 256 pixels wide; a task's gain from others is drawn as a share of its gain from itself."""


def report(record: AffinityRecord, measures: Sequence[str], console: Console) -> None:
    """Writes tables, hands over pictures, prints a table of each measure and what it says."""
    run = read_telemetry(record.folder / records.TELEMETRY_DIR)
    run.attrs["name"] = str(record.subject.path)
    said: list[str] = []
    for measure in measures:
        matrix = _matrix(run, measure, record.step)
        record.keep_file(f"tables/{measure}-step-{record.step:08d}.csv", _csv(matrix))
        shown = matrix if measure == REPRESENTATION else _matrix(run, measure, record.step, relative=True)
        record.log_heatmap(f"affinity_{measure}", _picture(shown, measure, record.step))
        _print_matrix(matrix, TITLES[measure], console)
        said += _sentences(run, matrix, measure, record.step)
    problem = record.finish()
    for sentence in said:
        console.print(f"• {sentence}", markup=False, highlight=False)
    if problem is not None:
        console.print(f"! {problem}", style="yellow", soft_wrap=True, markup=False, highlight=False)
    console.print(f"Files: {record.folder}", soft_wrap=True, markup=False, highlight=False)


def _matrix(run: xr.Dataset, measure: str, step: int, relative: bool = False) -> xr.DataArray:
    if measure == REPRESENTATION:
        return representation_affinity(run, step=step)
    return (look_ahead_affinity if measure == LOOK_AHEAD else fine_tuning_affinity)(run, step=step, relative=relative)


def _csv(matrix: xr.DataArray) -> bytes:
    """Long form: a row for each pair of intervals."""
    frame = matrix.rename("affinity").to_dataframe().reset_index()
    kept = ["interval", "other_interval", "affinity", "standard_error"]
    return frame[kept].to_csv(index=False).encode()


def _picture(matrix: xr.DataArray, measure: str, step: int) -> np.ndarray:
    labels = [str(label) for label in matrix["interval"].values]
    title = f"{_PICTURES[measure]}, step {step}"
    if measure == REPRESENTATION:
        return heatmap_image(matrix.values, labels, title=title, vmin=0.0, colors="sequential")
    return heatmap_image(matrix.values, labels, title=title)


def _print_matrix(matrix: xr.DataArray, title: str, console: Console) -> None:
    labels = [str(label).removeprefix("t") for label in matrix["interval"].values]
    table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 0))
    table.add_column("trained" if matrix.attrs["directed"] else "")
    for label in labels:
        table.add_column(label.split("-")[0], justify="right")
    signed = matrix.attrs["directed"]
    for label, row in zip(labels, matrix.values, strict=True):
        table.add_row(label, *(f"{100 * value:+.2g}%" if signed else f"{value:.2f}" for value in row))
    console.print(table)


def _sentences(run: xr.Dataset, matrix: xr.DataArray, measure: str, step: int) -> list[str]:
    values = matrix.values
    off = ~np.eye(len(values), dtype=bool)
    if measure == REPRESENTATION:
        near = np.abs(np.subtract.outer(np.arange(len(values)), np.arange(len(values)))) == 1
        return [
            f"Representations of neighbouring intervals have a CKA of {np.nanmean(values[near]):.2f}, of the outermost "
            f"two {values[0, -1]:.2f}."
        ]
    certain = significant_cells(matrix).values
    helped, harmed = int((off & certain & (values > 0)).sum()), int((off & certain & (values < 0)).sum())
    name = "A step" if measure == LOOK_AHEAD else f"Fine-tuning for {int(run['fine_tuning_updates'][-1])} updates"
    said = [
        f"{name} on one interval helps another in {helped} of {int(off.sum())} ordered pairs and harms it in {harmed} "
        f"(false discovery rate {100 * FALSE_DISCOVERY_RATE:.0f} %)."
    ]
    if measure == LOOK_AHEAD and run["look_ahead_predicted"].notnull().any():
        slope = first_order_slope(run, step=step)
        said.append(f"Measured look-aheads are {slope:.3f} times what gradients predict to first order.")
    return said
