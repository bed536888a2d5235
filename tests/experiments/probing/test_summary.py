"""Tests for what `dtr-lab probe` prints of intervals."""

import io

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from analysis.gramians import task_coordinates
from experiments.probing.summary import findings, precision_missed, print_intervals


def statistics(tasks, *, batches=16, error=0.123, scale=1234.5):
    matrix, row = ("task", "other_task"), ("task",)
    cosine = np.full((tasks, tasks), -0.5)
    bounds = np.linspace(0, 1000, tasks + 1).astype(int).tolist()
    found = xr.Dataset(
        {
            "cosine": (matrix, cosine),
            "cosine_error": (matrix, np.full((tasks, tasks), error)),
            "signal": (row, np.full(tasks, 12.0)),
            "noise_scale": (row, np.full(tasks, scale)),
            "noise_scale_error": (row, np.full(tasks, error)),
            "loss": (row, np.full(tasks, 0.0123)),
        },
        attrs={"batches": batches},
    )
    return found.assign_coords(task_coordinates(bounds, np.linspace(5, -5, 1000).tolist()).coords)


def printed(found, width=80):
    file = io.StringIO()
    print_intervals(found, Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("error", [0.123, 12.34])
def test_the_matrix_of_eight_intervals_fits_80_columns(error):
    lines = printed(statistics(8, error=error)).splitlines()
    start = next(at for at, line in enumerate(lines) if "cosine ±" in line)
    assert lines[start + 1].split() == [str(number) for number in range(2, 9)]
    cell = "-0.50±0.12" if error < 1 else "-0.50±12"
    for row, line in enumerate(lines[start + 2 :]):
        assert line.split() == [str(row + 1), *[cell] * (7 - row)]
    assert len(lines[start + 2 :]) == 7
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)


def test_a_matrix_that_does_not_fit_is_not_printed():
    assert "cosines.csv" in printed(statistics(9))
    assert "-0.50" not in printed(statistics(9))
    assert "-0.50±0.12" in printed(statistics(9), width=100)


@pytest.mark.parametrize(
    ("scale", "error", "batches", "says"),
    [
        (1234.5, 67.8, 16, "1,234 ± 68"),
        (3.14159, 0.25, 16, "3.14 ± 0.25"),
        (0.5, 0.0, 16, "0.50 "),
        (3.14159, 0.25, 7, "3.14 "),
        (np.nan, np.nan, 16, "not measurable"),
    ],
)
def test_noise_scales_have_decimals_and_errors_where_there_are_any(scale, error, batches, says):
    text = printed(statistics(4, scale=scale, error=error, batches=batches))
    assert says in text
    assert ("±" in text.replace("cosine ±", "")) == (error > 0 and batches >= 8)


NUMBERS = {
    "conflict_rate": 0.25,
    "conflict_rate_standard_error": 0.0,
    "pairs": 28,
    "pairs_defined": 3,
    "largest_standard_error": 0.113,
}


def test_errors_that_are_none_are_not_stated():
    assert findings(NUMBERS, 16, 1.0)[0] == "Conflict rate 0.250; noise alone would give 0.5."
    known = NUMBERS | {"conflict_rate_standard_error": 0.02}
    assert findings(known, 16, 1.0)[0].startswith("Conflict rate 0.250 ± 0.020;")
    few = " ".join(findings(known, 7, 1.0))
    assert "±" not in few
    assert "at least 8 batches" in few
    assert "0.113" not in few


def test_a_precision_not_reached_is_owned_up_to():
    said = precision_missed(0.05, NUMBERS)
    assert said == "Precision 0.05 not reached: largest standard error 0.113, 25 of 28 cosines undefined."
    none = precision_missed(0.05, NUMBERS | {"pairs_defined": 0, "largest_standard_error": None})
    assert none == "Precision 0.05 not reached: 28 of 28 cosines undefined."
