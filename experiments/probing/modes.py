"""The two measurements of `dtr-lab probe` from the first batch to the last word: intervals, and single timesteps."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import xarray as xr
from rich.console import Console
from rich.table import Table
from torch import Tensor

from analysis.report.timestep_figures import timestep_affinity_figure
from experiments.probing import summary
from experiments.probing.budget import MIN_BATCHES, Budget, Stopped, measure_batches
from experiments.probing.data import Batches, ProbeData
from experiments.probing.intervals import CHECK_EVERY, IntervalProbe
from experiments.probing.record import ProbeRecord, manifest_of, settings_of
from experiments.probing.subject import Subject
from experiments.probing.timesteps import HALVES, TimestepProbe, affinity_file, batches_needed, check_exact
from experiments.probing.verification import tolerance
from lightning_modules.errors import UserInputError
from lightning_modules.gradients.sketch import CountSketch, Projection
from lightning_modules.timesteps import TimestepIntervals
from lightning_modules.tracking import records
from lightning_modules.tracking.heatmap import heatmap_image

EXIT_WRONG, EXIT_INTERRUPTED = 1, 130
DEFAULT_BATCHES = 64
DEFAULT_PASSES = 8
"""Over all timesteps, four for each half."""
AFFINITY_FILE = "affinity.nc"
_VERIFIED_SHOWN = 5
_HEATMAP_MOST = 64
"""MLflow's image slider shows 256 pixels: more cells than this would be less than four pixels wide."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What both measurements need."""

    args: argparse.Namespace
    subject: Subject
    data: ProbeData
    record: ProbeRecord
    console: Console

    def batches(self) -> Batches:
        """The batches of this measurement."""
        return Batches(self.subject, self.data, self.args.batch_size, self.args.seed)

    def budget(self, batches: int) -> Budget:
        """The budget that the options name."""
        return Budget(batches, self.args.minutes, self.args.precision)

    def explain_stop(self, stopped: Stopped, count: int) -> str:
        """Why there are no more batches, in words."""
        reason = {
            "batches": "as asked",
            "minutes": f"stopped after {self.args.minutes} minutes",
            "precision": f"stopped at the precision of {self.args.precision} asked for",
            "interrupted": "interrupted: this is what had been measured until then",
        }[stopped]
        used = count * self.args.batch_size / len(self.data)
        again = f" Each image was used {used:.0f} times on average, with new noise." if used > 1.5 else ""
        batches = "1 batch" if count == 1 else f"{count} batches"
        return f"{batches} of {self.args.batch_size} samples, {reason}.{again}"

    def finish(self, numbers: dict[str, Any], stopped: Stopped, said: list[str]) -> None:
        """Prints the sentences, and keeps the summary."""
        for sentence in said:
            self.console.print(f"• {sentence}", markup=False, highlight=False)
        kept = {**settings_of(self.args, self.subject, self.data), **numbers, "stopped": stopped}
        known = {"run_id": self.subject.run_id, "step": self.subject.step}
        note = "\n".join([f"**Probe of** `{self.subject.path}`", "", *(f"- {sentence}" for sentence in said)])
        self.record.finish(kept | known, stopped, note)


def probe_intervals(setup: Setup, intervals: TimestepIntervals) -> int:
    """Measures Gramians of intervals, and reports on them; the exit code."""
    args, record = setup.args, setup.record
    probe = IntervalProbe(setup.subject, setup.batches(), intervals, args.halves)
    count = intervals.num_intervals
    record.start(setup.subject, f"{count} intervals", {**_settings(setup), "intervals": list(intervals.bounds)})
    manifest = manifest_of(setup.subject, setup.data, intervals, args.batch_size)
    record.log_manifest(manifest)
    verified: dict[str, Any] = {}
    if args.verify:
        worst, wrong = _verified(probe, setup.console)
        verified = {"verified_relative_error": worst if math.isfinite(worst) else None, "wrong_layers": sorted(wrong)}

    def measure(number: int) -> float | None:
        gramian = probe.measure(number)
        record.log_gramian(number, gramian, probe.losses[-1], args.halves)
        if number < MIN_BATCHES or number % CHECK_EVERY:
            return None
        error = probe.precision()
        record.log_metrics({"probe/standard_error": error}, number)
        return error

    measured, stopped = measure_batches(measure, setup.budget(args.batches or DEFAULT_BATCHES))
    record.flush()
    method, name = setup.subject.module.method, setup.subject.path.stem
    run = summary.read_measured(record.folder / records.TELEMETRY_DIR, method, manifest.seed, name)
    found = summary.interval_statistics(run)
    numbers = summary.summary_numbers(found)
    _keep_intervals(record, run, found, numbers, measured)
    summary.print_intervals(found, setup.console)
    said = [setup.explain_stop(stopped, measured), *summary.findings(numbers, measured, probe.coverage)]
    if args.precision is not None and (measured < MIN_BATCHES or not probe.precision() <= args.precision):
        said.append(summary.precision_missed(args.precision, numbers))
    if probe.wrong:
        said.append(f"Measured wrong, as a check of the first batch shows: {', '.join(sorted(probe.wrong))}.")
    if measured < 2:
        said.append("Nothing can be told from noise with fewer than two batches.")
    covered = {"coverage": probe.coverage, "uncovered": list(probe.uncovered)}
    setup.finish({**numbers, **verified, "batches": measured, **covered}, stopped, said)
    return EXIT_WRONG if verified.get("wrong_layers") else exit_code(stopped)


def _keep_intervals(
    record: ProbeRecord, run: xr.Dataset, found: xr.Dataset, numbers: dict[str, Any], measured: int
) -> None:
    """Writes tables, figures and scalars."""
    scalars = {
        "conflict/rate": numbers["conflict_rate"],
        "conflict/mean_cosine": numbers["mean_corrected_cosine"],
    }
    record.log_metrics({key: value for key, value in scalars.items() if value is not None}, measured)
    record.log_heatmap(
        "conflict_cosine",
        heatmap_image(found["cosine"].values, found["interval"].values.tolist(), title="Noise-corrected cosine"),
        measured,
    )
    record.log_file("intervals.csv", summary.intervals_csv(found))
    record.log_file("cosines.csv", summary.cosines_csv(found))
    for figure in summary.interval_figures(run):
        record.log_figure(figure)


def probe_timesteps(setup: Setup, timesteps: Tensor, projection: Projection) -> int:
    """Measures the affinity of single timesteps, and reports on it; the exit code."""
    args, record = setup.args, setup.record
    probe = TimestepProbe(setup.subject, setup.batches(), timesteps, args.samples, projection, args.seed)
    record.start(
        setup.subject,
        f"{len(timesteps)} timesteps",
        {**_settings(setup), "samples_per_visit": args.samples, "sketch_size": args.sketch_size},
    )
    held = probe.sums.sums.numel() + probe.groups * projection.width
    setup.console.print(f"Keeping {held:,} numbers ({4 * held / 1e6:,.0f} MB) of the gradients.", highlight=False)
    coverage = probe.coverage()

    def measure(number: int) -> float | None:
        probe.measure(number)
        if args.precision is None or not probe.ends_a_pair_of_passes(number):
            return None
        error = probe.precision()
        record.log_metrics({"probe/standard_error": error}, number)
        return error

    batches = args.batches or batches_needed(args, DEFAULT_PASSES)
    measured, stopped = measure_batches(measure, setup.budget(batches))
    said = [setup.explain_stop(stopped, measured)]
    affinity = probe.affinity(CountSketch(args.sketch_size, args.seed) if args.check_exact else None)
    if args.check_exact:
        said += _print_check(check_exact(probe, args), setup.console)
    record.log_file(AFFINITY_FILE, affinity_file(affinity))
    figure = timestep_affinity_figure(affinity)
    record.log_figure(figure)
    numbers = _affinity_numbers(affinity) | {"batches": measured, "coverage": coverage, "width": args.sketch_size}
    errors = {f"probe/{name}": numbers[name] for name in ("sampling_error", "sketch_error")}
    record.log_metrics({name: error for name, error in errors.items() if error is not None}, measured)
    if len(timesteps) <= _HEATMAP_MOST:
        labels = [str(t) for t in timesteps.tolist()]
        image = heatmap_image(affinity["cosine"].values, labels, title="Noise-corrected cosine")
        record.log_heatmap("timestep_affinity", image, measured)
    said += _affinity_findings(numbers)
    error = numbers["sampling_error"]
    if args.precision is not None and (error is None or error > args.precision):
        reached = "no cosine is defined" if error is None else f"the cosines' standard error is {error:.3f}"
        said.append(f"Precision {args.precision:g} not reached: {reached}.")
    setup.finish(numbers, stopped, said)
    return exit_code(stopped)


def exit_code(stopped: Stopped) -> int:
    """What the shell gets to know of the end."""
    return EXIT_INTERRUPTED if stopped == "interrupted" else 0


def check_timesteps_budget(args: argparse.Namespace) -> None:
    """Refuses a number of batches in which the halves cannot both see every timestep.

    Raises:
        UserInputError: Naming the number that it takes.
    """
    needed = batches_needed(args, HALVES)
    if args.batches is not None and args.batches < needed:
        raise UserInputError(
            f"--batches {args.batches} of {args.batch_size // args.samples} timesteps each do not show {args.timesteps}"
            f" timesteps to both halves: at least {needed} are needed, or a larger --batch-size"
        )


def _settings(setup: Setup) -> dict[str, Any]:
    return settings_of(setup.args, setup.subject, setup.data)


def _affinity_numbers(affinity: xr.Dataset) -> dict[str, Any]:
    defined = affinity["cosine"].notnull().values.diagonal()
    errors = {name: affinity.attrs[name] for name in ("sampling_error", "sketch_error")}
    return {
        "timesteps": len(defined),
        "timesteps_defined": int(defined.sum()),
        **{name: error if math.isfinite(error) else None for name, error in errors.items()},
    }


def _affinity_findings(numbers: dict[str, Any]) -> list[str]:
    said = []
    missing = numbers["timesteps"] - numbers["timesteps_defined"]
    if missing:
        said.append(
            f"The gradients of {missing} of {numbers['timesteps']} timesteps cannot be told from noise yet; their "
            "cosines are undefined. More batches, or more --samples, may show them."
        )
    if numbers["sampling_error"] is not None:
        said.append(
            f"Standard error of a defined cosine: {numbers['sampling_error']:.3f} from sampling, "
            f"{numbers['sketch_error']:.3f} from the projection to {numbers['width']:,} numbers (root mean squares)."
        )
    if numbers["coverage"] < 1:
        said.append(f"The sketches cover {numbers['coverage']:.2%} of the parameters only.")
    return said


def _verified(probe: IntervalProbe, console: Console) -> tuple[float, set[str]]:
    """Compares the engine with a backward pass per group on the first batch: the largest relative error, wrong layers.

    The error is infinite if it is not a number.
    """
    errors, wrong = probe.verify()
    errors = {layer: math.inf if math.isnan(error) else error for layer, error in errors.items()}
    table = Table(title="Against one backward pass per group", title_justify="left", title_style="bold")
    table.add_column("layer")
    table.add_column("relative error", justify="right")
    worst = sorted(errors.items(), key=lambda item: -item[1])
    for layer, error in worst[:_VERIFIED_SHOWN]:
        table.add_row(layer, f"{error:.1e}")
    console.print(table)
    verdict = f"wrong beyond rounding: {', '.join(sorted(wrong))}" if wrong else "verified"
    most = tolerance(probe.subject)
    console.print(
        f"• Worst of {len(errors)} layers: {worst[0][1]:.1e} ({worst[0][0]}); rounding explains up to {most:g}: "
        f"{verdict}.",
        markup=False,
        highlight=False,
    )
    return worst[0][1], wrong


def _print_check(rows: list[dict[str, float]], console: Console) -> list[str]:
    table = Table(title="Sketched against exact gradients", title_justify="left", title_style="bold")
    for column in ("D", "error of a cosine", "error x sqrt(D)", "stated by the sketch"):
        table.add_column(column, justify="right")
    for row in rows:
        scaled = row["error"] * math.sqrt(row["width"])
        table.add_row(f"{row['width']:.0f}", f"{row['error']:.4f}", f"{scaled:.2f}", f"{row['stated']:.4f}")
    console.print(table)
    last = rows[-1]
    return [f"Against exact gradients the cosines err by {last['error']:.4f} at D = {last['width']:.0f}."]
