"""Publishes later what a run could not publish while it lasted."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lightning_modules.errors import UserInputError
from lightning_modules.tracking.publisher import Publisher
from lightning_modules.tracking.spool import SPOOL_DIR, Spool, write_durably
from lightning_modules.tracking.store import check_store, mlflow_client, redacted, resolve_tracking_uri

log = logging.getLogger(__name__)

_OWNER_FILE = "run.json"


def remember_owner(spool: Spool, run_id: str, tracking_uri: str, *, writes_run: bool = True) -> None:
    """Notes beside the items where they belong, for `sync`; never a password.

    Args:
        spool: The items.
        run_id: Their run.
        tracking_uri: Its store.
        writes_run: Whether the items come from the run itself. What is measured of it later says nothing about
            whether the run has ended.
    """
    owner = {
        "run_id": run_id,
        "tracking_uri": tracking_uri if redacted(tracking_uri) == tracking_uri else None,
        "writes_run": writes_run,
    }
    write_durably(spool.directory / _OWNER_FILE, json.dumps(owner).encode())


def sync(run_dir: str | os.PathLike[str], tracking_uri: str | None = None) -> int:
    """Publishes what runs could not publish while they lasted, because the server was away or the process was killed.

    A run that died without saying so is marked KILLED.

    Args:
        run_dir: The directory of one run, ``<run_dir>/<run id>``, or one that holds several.
        tracking_uri: Where to; by default the store the run was started with.

    Returns:
        The number of items published.

    Raises:
        UserInputError: If there is nothing that could be synced, the store does not answer, or the run is still alive.
    """
    spools = sorted(_spools_below(Path(run_dir)))
    if not spools:
        raise UserInputError(f"{run_dir} holds no run of DTR Lab: give the run directory that the warning named")
    if len(spools) == 1:
        return _sync_one(spools[0], tracking_uri)
    count = 0
    for spool in spools:
        try:
            count += _sync_one(spool, tracking_uri)
        except UserInputError as error:
            log.warning("left out %s: %s", spool.parent, error)
    return count


def _spools_below(directory: Path) -> Iterator[Path]:
    for candidate in (directory, directory / SPOOL_DIR, *directory.glob(f"*/{SPOOL_DIR}")):
        if (candidate / _OWNER_FILE).is_file():
            yield candidate


def _sync_one(directory: Path, tracking_uri: str | None) -> int:
    from mlflow.exceptions import MlflowException

    spool = Spool(directory)
    owner = json.loads((directory / _OWNER_FILE).read_text())
    run_id = owner["run_id"]
    uri = resolve_tracking_uri(tracking_uri or owner["tracking_uri"])
    check_store(uri)
    spool.acquire()
    try:
        client = mlflow_client(uri)
        client.get_run(run_id)  # in the wrong store every item would be refused
        count = Publisher(client, run_id, spool).publish_pending()
        if owner.get("writes_run", True) and client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, "KILLED")
        return count
    except MlflowException as error:
        raise UserInputError(f"run {run_id} cannot be published to {redacted(uri)}: {error}") from error
    finally:
        spool.release()
