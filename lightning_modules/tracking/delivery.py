"""The thread that publishes a run's spool while it trains, and keeps trying while the store is away."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from lightning_modules.tracking.publisher import Publisher
from lightning_modules.tracking.spool import Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_LAST_PAUSE_SECONDS = 2.0


class Delivery:
    """Publishes in the background from `start` to `stop`. Holds the spool's lock, which the caller acquired."""

    def __init__(self, client: MlflowClient, run_id: str, spool: Spool) -> None:
        self._client = client
        self._run_id = run_id
        self._spool = spool
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._deadline: float | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread; leftovers of the spool go first."""
        self._wake.clear()
        self._stopping.clear()
        self._deadline = None
        self._thread = threading.Thread(target=self._loop, name="dtr-publisher", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Says that there is something new in the spool."""
        self._wake.set()

    def stop(self, timeout: float) -> int:
        """Publishes what it can within a time in seconds; the spool is released when the thread ends.

        Returns:
            The number of items that remain in the spool.
        """
        if self._thread is not None:
            self._deadline = time.monotonic() + timeout
            self._stopping.set()
            self._wake.set()
            # A call to a store that swallows packets may hang for minutes; the thread ends after it, or with us.
            self._thread.join(timeout + 1.0)
        return len(self._spool.pending())

    def _loop(self) -> None:
        publisher = Publisher(self._client, self._run_id, self._spool)
        failures = 0
        while True:
            last_round = self._stopping.is_set()
            try:
                publisher.publish_pending(self._deadline)
            except Exception as error:
                failures += 1
                if failures == 1:
                    self._warn(error)
                if not self._pause(failures, last_round):
                    break
                continue
            if failures:
                log.warning("the tracking store answers again; run %s is being published", self._run_id)
                failures = 0
            if last_round:
                break
            self._wake.wait()
            self._wake.clear()
        self._spool.release()

    def _pause(self, failures: int, last_round: bool) -> bool:
        """Waits longer after each failure; False if the time for trying is over."""
        seconds = min(_FIRST_PAUSE_SECONDS * 2.0 ** (failures - 1), _LONGEST_PAUSE_SECONDS)
        if not last_round:
            self._stopping.wait(seconds)
            return True
        seconds = min(seconds, _LAST_PAUSE_SECONDS)
        if self._deadline is None or time.monotonic() + seconds > self._deadline:
            return False
        time.sleep(seconds)
        return True

    def _warn(self, error: Exception) -> None:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        log.warning(
            "the tracking store does not answer: training goes on, telemetry waits in %s (%s)",
            self._spool.directory,
            reason[:300],
        )
