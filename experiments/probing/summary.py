"""What `dtr-lab probe` says about intervals: tables on the terminal, figures, and a summary to keep."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

from analysis import conflict, noise, significance
from analysis.gramians import STEP, pool_runs
from analysis.reading.telemetry import read_telemetry
from analysis.report.conflict_figures import blocks_figure, conflict_figure, noise_figure, raw_vs_corrected_figure
from analysis.report.panels import ReportFigure
from experiments.probing.budget import MIN_BATCHES

_WHOLE_FROM = 10
"""Smaller noise scales and errors are written with decimals."""
_CELL_WIDTH, _EDGE_WIDTH = 11, 3
"""Of the matrix on the terminal: "+0.12±0.03" and a space, and the number of the row."""


def interval_statistics(run: xr.Dataset) -> xr.Dataset:
    """Everything the terminal shows, from a run with halves: over ``task`` and ``other_task``, and scalars.

    Returns:
        ``cosine``, ``cosine_error`` (NaN where undefined), ``plain_cosine``, ``signal``, ``noise_scale``,
        ``noise_scale_error``, ``loss``, ``rate``, ``rate_error``; the attribute ``batches`` says from how many.
    """
    gramian, count = pool_runs([run])
    corrected = conflict.corrected_cosine(gramian, count)
    scale = noise.noise_scale(gramian, count)
    rate = significance.conflict_rate(gramian, count)
    return xr.Dataset(
        {
            "cosine": corrected["cosine"],
            "cosine_error": corrected["standard_error"],
            "plain_cosine": conflict.plain_cosine(gramian, count)["cosine"],
            "signal": corrected["signal"],
            "noise_scale": scale["noise_scale"],
            "noise_scale_error": scale["standard_error"],
            "loss": run["group_loss"].weighted(run["group_count"]).mean((STEP, "half")),
            "rate": rate["rate"],
            "rate_error": rate["standard_error"],
        },
        attrs={"batches": run.sizes[STEP]},
    )


def read_measured(folder: Path, method: str, seed: int, name: str) -> xr.Dataset:
    """The run that `record.ProbeRecord` wrote, with the names of its residual blocks and what else figures need."""
    run = read_telemetry(folder)
    blocks = list(json.loads(run.attrs["manifest"])["block_channels"])
    return run.assign_coords(block=blocks).assign_attrs(method=method, seed=seed, name=name)


def interval_figures(run: xr.Dataset) -> list[ReportFigure]:
    """The figures of `dtr-lab compare` that Gramians alone can fill."""
    made = [conflict_figure([run]), raw_vs_corrected_figure([run]), blocks_figure([run]), noise_figure([run])]
    return [figure for figure in made if figure is not None]


def summary_numbers(found: xr.Dataset) -> dict[str, Any]:
    """The scalars of a measurement; None where nothing can be said."""
    above = np.triu_indices(found.sizes["task"], 1)
    cosines, errors = found["cosine"].values[above], found["cosine_error"].values[above]
    defined = np.isfinite(cosines)
    return {
        "conflict_rate": _number(found["rate"]),
        "conflict_rate_standard_error": _number(found["rate_error"]),
        "conflict_rate_of_noise": significance.NOISE_NULL,
        "pairs": len(cosines),
        "pairs_defined": int(defined.sum()),
        "mean_corrected_cosine": _number(cosines[defined].mean()) if defined.any() else None,
        "largest_standard_error": _number(errors[defined].max()) if defined.any() else None,
    }


def _number(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def intervals_csv(found: xr.Dataset) -> bytes:
    """One row per interval."""
    return _csv(
        ["interval", "log_snr", "loss", "signal", "noise_scale", "noise_scale_standard_error"],
        zip(
            found["interval"].values,
            *(
                found[name].values.tolist()
                for name in ("log_snr", "loss", "signal", "noise_scale", "noise_scale_error")
            ),
            strict=True,
        ),
    )


def cosines_csv(found: xr.Dataset) -> bytes:
    """One row per pair of intervals."""
    labels = found["interval"].values
    names = ("plain_cosine", "cosine", "cosine_error")
    rows = (
        (labels[i], labels[j], *(float(found[name].values[i, j]) for name in names))
        for i, j in zip(*np.triu_indices(len(labels), 1), strict=True)
    )
    return _csv(["interval", "other_interval", "plain_cosine", "corrected_cosine", "standard_error"], rows)


def _csv(header: list[str], rows: Any) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def print_intervals(found: xr.Dataset, console: Console) -> None:
    """The intervals one by one, numbered, and the matrix between their numbers if it fits."""
    table = Table(title="Timestep intervals", title_justify="left", title_style="bold")
    for column in ("", "t", "log-SNR", "loss", "signal", "noise scale"):
        table.add_column(column, justify="right")
    for task in range(found.sizes["task"]):
        one = found.isel(task=task)
        table.add_row(
            str(task + 1),
            str(one["interval"].values).removeprefix("t"),
            f"{float(one['log_snr']):.1f}",
            f"{float(one['loss']):.4g}",
            f"{float(one['signal']):.1f}",
            _scale(float(one["noise_scale"]), _told(float(one["noise_scale_error"]), found)),
        )
    console.print(table)
    if _EDGE_WIDTH + _CELL_WIDTH * (found.sizes["task"] - 1) <= console.width:
        console.print(_matrix(found))
    else:
        console.print("• The cosines of all pairs are in cosines.csv.", highlight=False)


def _told(error: float, found: xr.Dataset) -> float | None:
    """A standard error, or None where it is one in name only: zero, undefined, or from too few batches."""
    return error if found.attrs["batches"] >= MIN_BATCHES and np.isfinite(error) and error > 0 else None


def _scale(scale: float, error: float | None) -> str:
    if not np.isfinite(scale):
        return "not measurable"
    digits = 0 if abs(scale) >= _WHOLE_FROM else 2
    return f"{scale:,.{digits}f}" + ("" if error is None else f" ± {error:,.{digits}f}")


def _matrix(found: xr.Dataset) -> Table:
    tasks = found.sizes["task"]
    table = Table(
        title="Noise-corrected gradient cosine ± standard error",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for column in ("", *(str(task + 1) for task in range(1, tasks))):
        table.add_column(column, justify="right", no_wrap=True)
    for row in range(tasks - 1):
        cells = [""] * row
        for other in range(row + 1, tasks):
            value = float(found["cosine"].values[row, other])
            error = _told(float(found["cosine_error"].values[row, other]), found)
            spread = "" if error is None else f"±{_four(error)}"
            cells.append(f"{value:+.2f}{spread}" if np.isfinite(value) else "–")
        table.add_row(str(row + 1), *cells)
    return table


def _four(number: float) -> str:
    """A positive number in four characters."""
    return f"{number:.2f}" if number < _WHOLE_FROM - 0.005 else f"{number:.0f}"


def findings(numbers: dict[str, Any], batches: int, coverage: float) -> list[str]:
    """The result in sentences."""
    said = []
    if numbers["conflict_rate"] is not None:
        error = numbers["conflict_rate_standard_error"]
        spread = "" if not error or batches < MIN_BATCHES else f" ± {error:.3f}"
        said.append(f"Conflict rate {numbers['conflict_rate']:.3f}{spread}; noise alone would give 0.5.")
    undefined = numbers["pairs"] - numbers["pairs_defined"]
    if undefined:
        said.append(
            f"{undefined} of {numbers['pairs']} cosines are undefined: a gradient cannot be told from noise yet. "
            "More batches may show it."
        )
    if batches < MIN_BATCHES:
        said.append(f"Standard errors need at least {MIN_BATCHES} batches.")
    elif numbers["largest_standard_error"]:
        said.append(f"Largest standard error of a corrected cosine: {numbers['largest_standard_error']:.3f}.")
    if coverage < 1:
        said.append(f"The Gramian covers {coverage:.2%} of the parameters only.")
    return said


def precision_missed(asked: float, numbers: dict[str, Any]) -> str:
    """That the precision asked for was not reached, and how far off it is."""
    undefined = numbers["pairs"] - numbers["pairs_defined"]
    largest = numbers["largest_standard_error"]
    known = "" if largest is None else f"largest standard error {largest:.3f}, "
    return f"Precision {asked:g} not reached: {known}{undefined} of {numbers['pairs']} cosines undefined."
