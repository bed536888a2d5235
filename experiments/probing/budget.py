"""How long `dtr-lab probe` measures: batches, minutes, the precision asked for, or Ctrl-C; and its progress bar."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from tqdm import tqdm

MIN_BATCHES = 8
"""A standard error from fewer batches is too uncertain to stop by, or to show."""

Stopped = Literal["batches", "minutes", "precision", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Budget:
    """When to stop.

    Attributes:
        batches: After so many batches at the latest.
        minutes: After the batch that exceeds so many minutes.
        precision: As soon as the error reported after a batch is at most this.
    """

    batches: int
    minutes: float | None = None
    precision: float | None = None


def measure_batches(measure: Callable[[int], float | None], budget: Budget) -> tuple[int, Stopped]:
    """Measures batch 1, 2, … until the budget is used up, with a progress bar on standard error.

    Args:
        measure: Measures a batch by number and returns the precision reached, or None if it was not looked at.
        budget: When to stop.

    Returns:
        The number of batches measured, and why there are no more. Ctrl-C lets the current batch finish; pressed again,
        it raises KeyboardInterrupt there and then.
    """
    started, error = time.monotonic(), math.inf
    with _first_interrupt() as interrupted, _bar(budget) as bar:
        for number in range(1, budget.batches + 1):
            reached = measure(number)
            error = error if reached is None else reached
            elapsed = time.monotonic() - started
            bar.set_postfix_str(_state(error, number, elapsed, budget), refresh=False)
            bar.update(1)
            if budget.precision is not None and reached is not None and reached <= budget.precision:
                return number, "precision"
            if interrupted():
                return number, "interrupted"
            if budget.minutes is not None and elapsed >= 60 * budget.minutes:
                return number, "minutes"
    return budget.batches, "batches"


def _bar(budget: Budget) -> tqdm:
    shape = "{n_fmt}/{total_fmt} batches |{bar}| {elapsed}{postfix}"
    return tqdm(total=budget.batches, bar_format=shape, dynamic_ncols=True, file=sys.stderr)


def _state(error: float, number: int, elapsed: float, budget: Budget) -> str:
    """Precision reached, and the time left by whichever limit comes first."""
    last = float(budget.batches)
    if budget.precision is not None and math.isfinite(error):
        last = min(last, number * (error / budget.precision) ** 2)  # errors fall with the root of the batches
    left = max(last - number, 0.0) * elapsed / number
    if budget.minutes is not None:
        left = min(left, max(60 * budget.minutes - elapsed, 0.0))
    said = f"standard error {error:.3f}, " if math.isfinite(error) else ""
    return f"{said}{tqdm.format_interval(left)} left"


@contextmanager
def _first_interrupt() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C only sets what the function yielded returns; the next one interrupts as ever."""
    seen = False

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True
        sys.stderr.write("\ninterrupted: finishing this batch (Ctrl-C again to give up)\n")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)
