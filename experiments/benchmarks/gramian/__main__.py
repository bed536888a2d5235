"""What the Gramian of K timestep intervals costs a training step: ours and others' ways, in one run on one machine.

``python -m experiments.benchmarks.gramian [--json]`` measures the whole training step (forward, backward, AdamW step)
with the exact K x K Gramian of the intervals' gradients, by

- *ours*: under `lightning_modules.gradients.GramianRecorder`; *ours_halves*: each task in two halves, at K = 8;
- *subbatches*: K forward and backward passes over the tasks' samples;
- *retained*: K backward passes over one retained graph, as LibMTL and PCGrad do;
- *autojac*, *autogram*: torchjd's two engines;
- *vmap_grad*: torch.func; *opacus*: Opacus' per-sample gradients.

Where a method can be run in several ways, the fastest right one counts, and the note names it. Every Gramian and
training gradient is first compared with float64 (`measure.check`); what fails, is wrong or does not fit into memory
gets a row with the reason and no numbers. Times are ratios to the plain steps just before and after, medians over
rounds; each round times all methods in an order of its own. Peak memory is that of live tensors during one step
(`measure.step_and_peak`). The row *plain* is the plain step against its neighbours: what ratio noise alone can give.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence

# The profiler's own messages, and torch's about memory that was allocated before it.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

from experiments.benchmarks.gramian.comparison import METHODS, Comparison
from experiments.benchmarks.gramian.methods import Setting
from experiments.benchmarks.gramian.report import Row, rows_of, table, verdicts
from experiments.benchmarks.gramian.workloads import Workload, find_workloads
from lightning_modules.errors import UserInputError

HALVES_K = 8
"""K at which ours is measured with two halves as well."""


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.gramian",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--models", nargs="+", default=[], metavar="MODEL", help="DiT, U-Net, DiT-128, DiT-B/2, ...")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--K", nargs="+", type=int, metavar="K", help="(default: 4 8 16 32; with --quick 2 4)")
    parser.add_argument("--rounds", type=int, default=15, help="at most; slow methods take fewer (default: 15)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=22,
        help="time for the rounds of all models together; checks come on top (default: 22)",
    )
    parser.add_argument("--repeats", type=int, default=1, help="steps per timing (default: 1)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: torch's choice)")
    parser.add_argument("--batch", type=int, help="instead of each model's own batch size")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the forward pass")
    parser.add_argument("--compile", action="store_true", help="torch.compile, where a method allows it")
    parser.add_argument("--quick", action="store_true", help="toy models and 2 rounds: a test that it runs")
    return parser


def main(given: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = arguments()
    options = parser.parse_args(given)
    quieten()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.K = options.K or ([2, 4] if options.quick else [4, 8, 16, 32])
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    try:
        workloads = find_workloads(options.models, "quick" if options.quick else "default", options.batch)
        for workload in workloads:
            for number in options.K:
                workload.batch(number)
    except UserInputError as error:
        parser.error(str(error))
    rows = measure_all(workloads, options)
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    print(table(rows))
    print(*verdicts(rows), sep="\n")


def measure_all(workloads: Sequence[Workload], options: argparse.Namespace) -> list[Row]:
    """The rows of all workloads."""
    setting = Setting(options.device, options.precision, options.compile)
    log = progress()
    log("timing the plain steps")
    comparisons = [Comparison(workload, setting, options.methods, log) for workload in workloads]
    rounds = min(2, options.rounds) if options.quick else options.rounds
    started = time.perf_counter()
    work_left = sum(comparison.plain_seconds for comparison in comparisons)
    rows: list[Row] = []
    for index, comparison in enumerate(comparisons):
        comparison.log = progress(f"{comparison.workload.name} ({index + 1} of {len(comparisons)}): ")
        time_left = 60 * options.minutes - (time.perf_counter() - started)
        share = time_left * comparison.plain_seconds / work_left
        work_left -= comparison.plain_seconds
        begun = time.perf_counter()
        comparison.check_all(options.K, [HALVES_K if HALVES_K in options.K else max(options.K)])
        comparison.run(rounds, share - (time.perf_counter() - begun), options.repeats)
        rows += rows_of(comparison)
        comparison.cases.clear()
    log("done")
    return rows


def progress(prefix: str = "") -> Callable[[str], None]:
    """Prints what is being done to the error stream: over the line before on a terminal, else line by line."""
    terminal = sys.stderr.isatty()

    def log(text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {prefix}{text}"
        print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    return log


def quieten() -> None:
    """Drops the peers' warnings, which say nothing about the measurement."""
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    main()
