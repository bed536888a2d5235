"""Work side by side on data that this process holds: forked processes see it without a copy."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: list[tuple[Callable[[Any], Any], Sequence[Any]]] = []
"""What forked processes are to do: they inherit it, since functions on large data cannot be sent."""


def forked_map(function: Callable[[Item], Result], items: Sequence[Item], processes: int | None = None) -> list[Result]:
    """``[function(item) for item in items]``, by several processes where the system can fork them without harm (Linux).

    Args:
        function: Of which only the results are sent between processes; must not use an accelerator.
        items: What it is called with; the first ones are begun first.
        processes: How many at most; by default as many as this process may use processors.

    Raises:
        Exception: What the function raises.
    """
    most = processes or _processors()
    if sys.platform != "linux" or min(most, len(items)) < 2:
        return [function(item) for item in items]
    _work.append((function, items))
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(most, len(items)), context, initializer=_begin) as pool:
            with warnings.catch_warnings():
                # Python 3.12 warns that another thread may hold a lock for ever after. Those of Arrow and MLflow are
                # idle here, and the function calls neither.
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                results = pool.map(_call, range(len(items)))
            return list(results)
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
    function, items = _work[-1]
    return function(items[place])
