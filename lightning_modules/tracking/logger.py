"""The Lightning logger of DTR Lab: an MLflow run that begins when training does and ends with the right status."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightning_modules.errors import UserInputError
from lightning_modules.interrupts import interrupts_held_back
from lightning_modules.tracking import records
from lightning_modules.tracking.store import (
    check_store,
    ensure_experiment,
    mlflow_client,
    redacted,
    resolve_tracking_uri,
)
from lightning_modules.tracking.writer import TAG_ATTEMPT, RunWriter

TAG_CONTINUES = "dtr.continues_run"
"""The run whose checkpoint a new run started from."""


class TrackingLogger(Logger):
    """Logs to MLflow through a `RunWriter`.

    The run is created by the first access to `writer`, which `RunTracking` makes when training starts: after the data
    are loaded, the model is built, the checkpoint is restored and the sanity check has passed. A configuration that
    fails before leaves no run behind. There is deliberately no ``experiment`` property, since Lightning reads that
    one before anything is set up.

    Args:
        tracking_uri: Store; by default ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working directory.
        experiment: Name of the MLflow experiment, created if need be.
        run_name: Name of the run in the UI; by default MLflow invents one.
        comparison: Name that runs of one comparison share, as the tag ``dtr.comparison``.
        parent_run_id: Run under which this one is nested in the UI.
        run_dir: Folder for local files; checkpoints go to ``<run_dir>/<run_id>/checkpoints``.
        tags: Further tags of the run.
        run_id: Run to resume; by default a new one is created.

    Raises:
        UserInputError: If the store cannot be used (checked at once, on rank zero).
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment: str = "dtr-lab",
        run_name: str | None = None,
        comparison: str | None = None,
        parent_run_id: str | None = None,
        run_dir: str = "runs",
        tags: dict[str, str] | None = None,
        run_id: str | None = None,
    ) -> None:
        super().__init__()
        self.tracking_uri = resolve_tracking_uri(tracking_uri)
        if _on_rank_zero():
            check_store(self.tracking_uri)
        self._experiment_name = experiment
        self.run_name = run_name
        self._tags = {str(key): str(value) for key, value in (tags or {}).items()}
        self._tags[records.TAG_KIND] = self._tags.get(records.TAG_KIND, records.KIND_TRAINING)
        if comparison is not None:
            self._tags[records.TAG_COMPARISON] = comparison
        if parent_run_id is not None:
            self._tags["mlflow.parentRunId"] = parent_run_id
        self._run_dir = os.path.abspath(run_dir)
        self._resumes = run_id is not None
        self._run_id = run_id
        self._resumed_from = 0
        self._params: dict[str, Any] = {}
        self._writer: RunWriter | None = None
        self.provisional_version = f"starting-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"

    @property
    def writer(self) -> RunWriter:
        """The run's writer; begins the run, or continues it if it was finalized.

        Raises:
            RuntimeError: Off rank zero, where nothing is logged.
            UserInputError: If the run to resume does not exist, is deleted, or is being written by another process.
        """
        if not _on_rank_zero():
            raise RuntimeError("only rank zero logs: ask writer_of(trainer), which is None elsewhere")
        if self._writer is None:
            # Interrupted between the run's creation and here, it would stay RUNNING for good.
            with interrupts_held_back():
                self._writer = self._resumed_writer() if self._resumes else self._new_writer()
            if self._params:
                self._writer.log_params(self._params)
        self._writer.reopen()
        return self._writer

    @property
    def active_writer(self) -> RunWriter | None:
        """The writer if the run has begun here; unlike `writer`, begins nothing."""
        return self._writer

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once it exists."""
        return self._run_id

    def resume(self, run_id: str) -> None:
        """Goes on with this run instead of creating one; as the argument ``run_id``, before the run has begun."""
        self._resumes, self._run_id = True, run_id

    def start_from_checkpoint(self, step: int, run_id: str | None) -> None:
        """Notes, before the run begins, that training continues from a checkpoint.

        Args:
            step: Completed optimizer steps at the checkpoint.
            run_id: The run that wrote it, if known.

        Raises:
            UserInputError: If this logger is to resume another run than the checkpoint's.
        """
        if self._resumes and run_id is not None and run_id != self._run_id:
            raise UserInputError(
                f"the checkpoint belongs to run {run_id}, not to run {self._run_id}: resume that one, or start a new "
                "run by giving no run id"
            )
        self._resumed_from = step
        if not self._resumes and run_id is not None:
            self._tags[TAG_CONTINUES] = run_id

    # Lightning's interface.

    @property
    def name(self) -> str:
        """Empty: `version`, the run's id, is unique by itself."""
        return ""

    @property
    def version(self) -> str:
        """The run's id; before the run exists a provisional name, see `RunTracking`."""
        return self._run_id or self.provisional_version

    @property
    def save_dir(self) -> str:
        """Folder under which Lightning puts ``<version>/checkpoints``."""
        return self._run_dir

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Keeps hyperparameters until the run begins, see `RunWriter.log_params`."""
        params = vars(params) if isinstance(params, Namespace) else dict(params)
        self._params.update(params)
        if self._writer is not None:
            self.writer.log_params(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hands metrics to the writer, without the ``epoch`` that Lightning adds to every one."""
        wanted = {key: value for key, value in metrics.items() if key != "epoch"}
        if wanted:
            self.writer.log_metrics(wanted, step or 0)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the run, if it has begun, as FINISHED, FAILED, or KILLED (Ctrl-C or SIGTERM)."""
        if self._writer is None:
            return
        if status in ("success", "finished"):
            self._writer.close("FINISHED")
        else:
            # Lightning says "failed" for Ctrl-C too, but calls this while it handles the exception.
            stopped = isinstance(sys.exc_info()[1], KeyboardInterrupt | SIGTERMException)
            self._writer.close("KILLED" if stopped else "FAILED")

    def __deepcopy__(self, memo: dict[int, Any]) -> TrackingLogger:
        return self  # there is one run, whoever copies the trainer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None}  # threads and locks do not travel

    def _new_writer(self) -> RunWriter:
        client = mlflow_client(self.tracking_uri)
        experiment_id = ensure_experiment(client, self.tracking_uri, self._experiment_name)
        run = client.create_run(experiment_id, tags=_circumstances() | self._tags, run_name=self.run_name)
        self._run_id = run.info.run_id
        return RunWriter(client, run.info.run_id, self._run_dir, self.tracking_uri, resumed_from=self._resumed_from)

    def _resumed_writer(self) -> RunWriter:
        from mlflow.exceptions import MlflowException

        assert self._run_id is not None
        client = mlflow_client(self.tracking_uri)
        try:
            run = client.get_run(self._run_id)
        except MlflowException as error:
            raise UserInputError(
                f"run {self._run_id} cannot be resumed from {redacted(self.tracking_uri)}: {error}"
            ) from error
        if run.info.lifecycle_stage == "deleted":
            raise UserInputError(f"run {self._run_id} was deleted: `mlflow runs restore --run-id {self._run_id}`")
        writer = RunWriter(
            client,
            self._run_id,
            self._run_dir,
            self.tracking_uri,
            attempt=int(run.data.tags.get(TAG_ATTEMPT, "1")) + 1,
            resumed_from=self._resumed_from,
        )
        writer.set_tags(_circumstances() | self._tags)
        return writer


def _on_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _circumstances() -> dict[str, str]:
    """Tags that say who ran what: user, script, and the commit of this code."""
    tags = {"mlflow.source.name": os.path.basename(sys.argv[0]) or "python", "mlflow.source.type": "LOCAL"}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        tags["mlflow.user"] = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags[records.TAG_GIT_COMMIT] = commit + ("-dirty" if _git("status", "--porcelain") else "")
    return tags


def _git(*arguments: str) -> str:
    """Output of git in the folder of this code; empty if there is no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
