"""Several trainings or measurements side by side, each in a process of its own, under one set of progress bars."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
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


def run_trainings(trainings: Sequence[Training], workers: int) -> list[Training]:
    """Runs the trainings, ``workers`` at a time, each on its share of the cores.

    Returns:
        The trainings that failed; once one has, no further ones are started.

    Raises:
        KeyboardInterrupt: After Ctrl-C, when all running trainings have closed their runs.
    """
    return _Pool(trainings, workers).run()


def report_failures(failed: Sequence[Training]) -> bool:
    """Prints the ends of the failed ones' logs; whether there are any."""
    for job in failed:
        print(f"\n{job.name} failed; the end of {job.log}:\n{job.log_tail()}", file=sys.stderr)
    return bool(failed)


class _Pool:
    def __init__(self, trainings: Sequence[Training], workers: int) -> None:
        self.waiting: queue.SimpleQueue[tuple[Training, TaskID]] = queue.SimpleQueue()
        self.workers = min(workers, len(trainings))
        self.threads_each = max(1, (os.cpu_count() or 1) // self.workers)
        self.processes: list[subprocess.Popen[str]] = []
        self.failed: list[Training] = []
        self.stopping = threading.Event()
        self.lock = threading.Lock()
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
        for training in trainings:
            self.waiting.put((training, self.progress.add_task(training.name, total=None, start=False, loss="")))

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
        return self.failed

    def _work(self) -> None:
        while not self.stopping.is_set():
            try:
                training, task = self.waiting.get_nowait()
            except queue.Empty:
                return
            if self._train(training, task) != 0 and not self.stopping.is_set():
                self.failed.append(training)
                self.stopping.set()

    def _train(self, training: Training, task: TaskID) -> int:
        training.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "experiments", training.command, *training.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads_each), "PYTHONUNBUFFERED": "1"}
        with training.log.open("w") as log:
            with self.lock:
                if self.stopping.is_set():
                    return 0
                # A session of its own: Ctrl-C in the terminal reaches the pool alone, which passes it on once.
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
                )
                self.processes.append(process)
            assert process.stdout is not None
            self.progress.start_task(task)
            for line in process.stdout:
                if not self._show(task, line):
                    log.write(line)
            status = process.wait()
        if not self.console.is_terminal:
            self.console.print(f"{training.name}: {'done' if status == 0 else f'failed ({status})'}")
        return status

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
