"""Work side by side on data that this process holds: forked processes see it without a copy."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from threadpoolctl import threadpool_limits

from lightning_modules.errors import UserInputError

_work: list[Sequence[Callable[[], Any]]] = []
"""What forked processes are to do: they inherit it, since functions of large data cannot be sent."""


def forked_calls(calls: Sequence[Callable[[], Any]], processes: int | None = None) -> list[Any]:
    """``[call() for call in calls]``, by several processes where the system can fork them without harm (Linux).

    Args:
        calls: Of which only the results are sent between processes; must not use an accelerator. The first ones are
            begun first.
        processes: How many at most; by default as many as this process may use processors.

    Raises:
        UserInputError: If the system killed a process, as it does where memory runs out.
        Exception: What a call raises.
    """
    number = min(processes or _processors(), len(calls))
    if sys.platform != "linux" or number < 2:
        return [call() for call in calls]
    _work.append(calls)
    try:
        with ProcessPoolExecutor(number, multiprocessing.get_context("fork"), initializer=_begin) as pool:
            with warnings.catch_warnings():
                # Python 3.12 warns that another thread may hold a lock for ever after. Arrow takes care of its threads
                # when it is forked, and those of MLflow are idle here.
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                results = pool.map(_call, range(len(calls)))
            return list(results)
    except BrokenProcessPool as error:
        raise UserInputError(
            "a process that made figures or tables was killed, probably for memory: free some, or compare fewer runs "
            f"(--runs); {number} processes worked side by side, `taskset -c 0 dtr-lab compare ...` uses one"
        ) from error
    finally:
        _work.pop()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin() -> None:
    # As many processes as processors: threads of their own would only stand in one another's way.
    threadpool_limits(1)
    # A short life needs no tidying up, and looking at every object would copy what is shared.
    gc.disable()


def _call(place: int) -> Any:
    return _work[-1][place]()
