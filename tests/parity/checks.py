"""Compares our numbers with a directory of recorded ones."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_modules.noise_schedules import NoiseSchedule
from lightning_modules.routing import dtr_windows
from tests.parity.cases import INPUTS, WEIGHT_PREFIX, Arrays, Case, quantities, schedule_name

TOLERANCE = 1e-5
WINDOW_KEY = re.compile(r"T(?P<T>\d+)_C(?P<C>\d+)_beta(?P<beta>[\d.e+-]+)_alpha(?P<alpha>[\d.e+-]+)")
SCHEDULE_KEY = re.compile(
    r"(?P<schedule>\w+)\.(?P<quantity>betas|alphas_cumprod|alphas_cumprod_prev|posterior_variance|snr)"
)


class Finding(NamedTuple):
    """One compared quantity, or (where ``problem`` is set) the reason why it, or all of a case, failed."""

    case: str
    quantity: str
    error: float
    problem: str = ""


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest relative error over the slices along the first axis (samples, timesteps, intervals, parameters).

    A slice's error is its largest absolute difference over its largest absolute reference value, so that a sample
    with a large loss cannot hide an error in another's. Slices that are zero but for rounding are measured
    against 1e-9 of the whole array's largest value instead.

    Returns:
        The error; infinite if either side is not finite.

    Raises:
        ValueError: If the shapes differ, or nothing is there to compare.
    """
    ours, reference = np.asarray(ours, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if ours.shape != reference.shape:
        raise ValueError(f"shape {ours.shape} here, {reference.shape} in the reference")
    if reference.size == 0:
        raise ValueError("the reference is empty")
    if not (np.isfinite(ours).all() and np.isfinite(reference).all()):
        return float("inf")
    slices = (len(reference), -1) if reference.ndim else (1, 1)
    difference = np.abs(ours - reference).reshape(slices).max(axis=1)
    scale = np.abs(reference).reshape(slices).max(axis=1)
    floor = 1e-9 * scale.max() or 1.0
    return float((difference / np.maximum(scale, floor)).max())


def check_directory(directory: Path) -> Iterator[Finding]:
    """Compares everything in a directory: cases, windows and schedules; a part of these will do.

    Yields:
        One finding per quantity, and one for everything that could not be checked.
    """
    if not directory.is_dir():
        yield Finding(str(directory), "directory", float("nan"), "is not a directory")
        return
    descriptions: dict[str, Any] = {}
    catalogue = directory / "cases.json"
    if catalogue.exists():
        try:
            descriptions = json.loads(catalogue.read_text())
            if not isinstance(descriptions, dict):
                raise ValueError("it must hold an object of cases by name")
        except (OSError, ValueError) as error:
            descriptions = {}
            yield Finding("cases.json", "file", float("nan"), f"cannot be read: {error}")
    for name in sorted({*descriptions, *(path.stem for path in directory.glob("*.npz"))}):
        yield from _check_file(directory / f"{name}.npz", descriptions.get(name))


def _check_file(path: Path, description: dict[str, Any] | None) -> Iterator[Finding]:
    """Findings of one ``.npz`` file: a case if it is described, else windows or schedules."""
    try:
        with np.load(path) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        missing = "is missing, though cases.json describes it" if not path.exists() else f"cannot be read: {error}"
        yield Finding(path.stem, "file", float("nan"), missing)
        return
    if description is not None:
        findings = _check_case(Case(path.stem, description, arrays))
    else:
        findings = _check_tables(path.stem, arrays)
    checked = 0
    for finding in findings:
        checked += 1
        yield finding
    if not checked:
        yield Finding(path.stem, "file", float("nan"), "holds nothing to check")


def _check_case(case: Case) -> Iterator[Finding]:
    seen: set[str] = set()
    try:
        for name, ours, reference in quantities(case):
            seen.add(name)
            yield _compare(case.name, name, ours, reference)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        # What a malformed description or array can raise on its way through the model: report it, go on with the rest.
        yield Finding(case.name, "case", float("nan"), f"cannot be recomputed: {error}")
        return
    for name in sorted(case.arrays.keys() - seen - set(INPUTS)):
        if not name.startswith(WEIGHT_PREFIX):
            yield Finding(case.name, name, float("nan"), "is recorded, but this check does not know it")


def _check_tables(name: str, arrays: Arrays) -> Iterator[Finding]:
    """Windows and schedules: the key of each array says what it is."""
    if any(key in INPUTS or key.startswith(WEIGHT_PREFIX) for key in arrays):
        yield Finding(name, "case", float("nan"), "is not described in cases.json, so it cannot be recomputed")
        return
    for key, reference in arrays.items():
        try:
            if window := WINDOW_KEY.fullmatch(key):
                ours = dtr_windows(
                    int(window["T"]),
                    int(window["C"]),
                    alpha=float(window["alpha"]),
                    beta=float(window["beta"]),
                    variant="official",
                )
            elif match := SCHEDULE_KEY.fullmatch(key):
                ours = getattr(NoiseSchedule.named(schedule_name(match["schedule"]), len(reference)), match["quantity"])
            else:
                yield Finding(
                    name,
                    key,
                    float("nan"),
                    "is neither a window (T.._C.._beta.._alpha..) nor a schedule",
                )
                continue
        except (ValueError, TypeError) as error:
            yield Finding(name, key, float("nan"), f"cannot be recomputed: {error}")
            continue
        yield _compare(name, key, ours, reference)


def _compare(case: str, quantity: str, ours: np.ndarray, reference: np.ndarray) -> Finding:
    try:
        error = relative_error(ours, reference)
    except (ValueError, TypeError) as problem:
        return Finding(case, quantity, float("nan"), f"cannot be compared: {problem}")
    if error <= TOLERANCE:
        return Finding(case, quantity, error)
    return Finding(case, quantity, error, f"is off by {error:.3g} (relative), more than {TOLERANCE:g}")
