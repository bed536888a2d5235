"""One process at a time works on a sweep, and none while trainings of one that was killed are still running."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lightning_modules.errors import UserInputError

try:
    import fcntl
except ImportError:  # Windows: two sweeps at once are not detected there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def sole_sweep(folder: Path) -> Iterator[tuple[int, ...]]:
    """Holds a sweep's folder for this process.

    Yields:
        File descriptors that the trainings must inherit: while one of them lives, the folder is not free. A training
        whose sweep was killed ends by itself, at the first progress that nobody reads.

    Raises:
        UserInputError: If another process works on the sweep.
    """
    with (folder / "sweep.lock").open("w") as own, (folder / "trainings.lock").open("w") as inherited:
        if fcntl is None:
            yield ()
            return
        if not _taken(own):
            raise UserInputError(f"{folder}: another `dtr-lab sweep` works on this sweep: wait for its end, or stop it")
        if not _taken(inherited):
            print("Waiting for trainings that an interrupted sweep left behind to end …", flush=True)
            while not _taken(inherited):
                time.sleep(0.2)
        yield (inherited.fileno(),)


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
