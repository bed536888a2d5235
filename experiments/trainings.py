"""Several trainings or measurements side by side, each in a process of its own, under one set of progress bars."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

GRACE_SECONDS = 60.0
"""How long an interrupted training may take to close its run before it is killed."""


@dataclasses.dataclass(frozen=True)
class Training:
    """One training, or another long command, to run.

    Attributes:
        name: For the progress bar.
        arguments: Command line after ``dtr-lab train``; must ask for its progress as lines.
        log: File that receives what it prints beside its progress.
        command: The command, if it is not ``train``.
    """

    name: str
    arguments: list[str]
    log: Path
    command: str = "train"

    def log_tail(self, lines: int = 15) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text().splitlines()[-lines:])


def run_trainings(
    trainings: Iterable[Training],
    workers: int,
    *,
    go_on: bool = False,
    total: int | None = None,
    ended: Callable[[Training, bool], None] | None = None,
    inherited: Sequence[int] = (),
) -> list[Training]:
    """Runs the trainings, ``workers`` at a time, each on its share of the cores.

    Args:
        trainings: A sequence shows a bar for each from the start. Of any other iterable the next one is asked for when
            a worker is free, so that it may depend on those that ended; its bar stays as long as it runs.
        workers: How many run side by side.
        go_on: Whether further ones are started after one has failed.
        total: How many there are, for a bar over all.
        ended: Told of each training that ended, and whether it succeeded; one call at a time, and none after Ctrl-C.
        inherited: File descriptors that the processes keep open.

    Returns:
        The trainings that failed; unless ``go_on``, no further ones are started once one has.

    Raises:
        KeyboardInterrupt: After Ctrl-C, when all running trainings have closed their runs.
        Exception: Whatever ``trainings`` or ``ended`` raised, when all running trainings have ended.
    """
    return _Pool(trainings, workers, go_on, total, ended, inherited).run()


def report_failures(failed: Sequence[Training]) -> bool:
    """Prints the ends of the failed ones' logs; whether there are any."""
    for job in failed:
        print(f"\n{job.name} failed; the end of {job.log}:\n{job.log_tail()}", file=sys.stderr)
    return bool(failed)


class _Pool:
    def __init__(
        self,
        trainings: Iterable[Training],
        workers: int,
        go_on: bool,
        total: int | None,
        ended: Callable[[Training, bool], None] | None,
        inherited: Sequence[int],
    ) -> None:
        known = len(trainings) if isinstance(trainings, Sequence) else total
        self.workers = workers if known is None else min(workers, max(1, known))
        self.threads_each = max(1, (os.cpu_count() or 1) // self.workers)
        self.go_on = go_on
        self.ended = ended
        self.inherited = tuple(inherited)
        self.processes: list[subprocess.Popen[str]] = []
        self.failed: list[Training] = []
        self.error: BaseException | None = None
        self.stopping = threading.Event()
        self.interrupted = threading.Event()
        self.lock = threading.Lock()
        self.turn = threading.Lock()  # of asking for the next training and of telling of one that ended
        # On a terminal the bars move in place; elsewhere each training says when it is done.
        self.console = Console()
        self.progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.overall = None if total is None else self.progress.add_task("all", total=total, loss="")
        self.bars_stay = isinstance(trainings, Sequence)
        started = [(training, self._bar(training)) for training in trainings] if self.bars_stay else None
        self.waiting: Iterator[tuple[Training, TaskID]] = (
            iter(started) if started is not None else ((training, self._bar(training)) for training in trainings)
        )

    def run(self) -> list[Training]:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.workers)]
        with self.progress:
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.2)  # a join without a limit would not let Ctrl-C through
            except KeyboardInterrupt:
                self._stop()
                raise
        if self.error is not None:
            raise self.error
        return self.failed

    def _bar(self, training: Training) -> TaskID:
        return self.progress.add_task(training.name, total=None, start=False, loss="")

    def _work(self) -> None:
        try:
            while True:
                with self.turn:
                    following = None if self.stopping.is_set() else next(self.waiting, None)
                if following is None:
                    return
                status = self._train(*following)
                with self.turn:
                    if status is None or self.interrupted.is_set():
                        return
                    self._end(*following, status)
        except BaseException as error:
            self.error = self.error or error
            self.stopping.set()

    def _end(self, training: Training, task: TaskID, status: int) -> None:
        if status != 0:
            self.failed.append(training)
            if not self.go_on:
                self.stopping.set()
        if self.overall is not None:
            self.progress.advance(self.overall)
        if not self.bars_stay:
            self.progress.remove_task(task)
        if not (self.console.is_terminal and self.bars_stay):
            self.console.print(f"{training.name}: {'done' if status == 0 else f'failed ({status})'}")
        if self.ended is not None:
            self.ended(training, status == 0)

    def _train(self, training: Training, task: TaskID) -> int | None:
        """The exit status; None if it was not started any more."""
        training.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "experiments", training.command, *training.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads_each), "PYTHONUNBUFFERED": "1"}
        with training.log.open("w") as log:
            with self.lock:
                if self.stopping.is_set():
                    return None
                # A session of its own: Ctrl-C in the terminal reaches the pool alone, which passes it on once.
                process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                    start_new_session=True,
                    pass_fds=self.inherited,
                )
                self.processes.append(process)
            assert process.stdout is not None
            self.progress.start_task(task)
            for line in process.stdout:
                if not self._show(task, line):
                    log.write(line)
            return process.wait()

    def _show(self, task: TaskID, line: str) -> bool:
        """Moves the bar; False if the line is not a progress report."""
        try:
            state = json.loads(line)
            step, total, loss = state["step"], state["max_steps"], state["loss"]
        except (ValueError, TypeError, KeyError):
            return False
        self.progress.update(task, completed=step, total=total, loss="" if loss is None else f"loss {loss:.4f}")
        return True

    def _stop(self) -> None:
        self.stopping.set()
        self.interrupted.set()
        self.progress.console.print("Interrupted: closing the runs …")
        with self.lock:
            running = [process for process in self.processes if process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
