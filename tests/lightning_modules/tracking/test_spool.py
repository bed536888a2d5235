"""Tests for ``lightning_modules/tracking/spool.py``."""

import os
import subprocess
import sys

import pytest

from lightning_modules.errors import UserInputError
from lightning_modules.tracking import spool as spool_module
from lightning_modules.tracking.spool import Spool, SpoolItem, write_durably


def item(name):
    return SpoolItem("file", 1, {"path": name}, b"first\nsecond\x00\n")


def test_items_come_back_in_order_and_numbers_go_on_after_a_restart(tmp_path):
    spool = Spool(tmp_path)
    for number in range(12):
        spool.put(item(f"{number}"))
    restarted = Spool(tmp_path)
    restarted.put(SpoolItem("image", 2, {"key": "k", "step": 3, "timestamp": 4}, b"png"))
    read = [restarted.read(path) for path in restarted.pending()]
    assert read[:-1] == [item(f"{number}") for number in range(12)]
    assert read[-1] == SpoolItem("image", 2, {"key": "k", "step": 3, "timestamp": 4}, b"png")


def test_a_half_written_item_is_no_item(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    spool.put(item("whole"))

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(spool_module.os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            spool.put(item("lost"))
    spool.put(item("next"))
    assert [spool.read(path).header["path"] for path in spool.pending()] == ["whole", "next"]
    assert not list(tmp_path.glob("*.tmp"))


def test_replacing_keeps_the_old_content_if_the_disk_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_durably(path, b"old")
    monkeypatch.setattr(spool_module.os, "fsync", lambda descriptor: os.close(-1))
    with pytest.raises(OSError, match="descriptor"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"


def test_rejected_items_are_kept_apart(tmp_path):
    spool = Spool(tmp_path)
    kept = [spool.reject(spool.put(item("a"))), Spool(tmp_path).reject(Spool(tmp_path).put(item("b")))]
    assert not spool.pending()
    assert [SpoolItem.from_bytes("file", path.read_bytes()).header["path"] for path in kept] == ["a", "b"]


def test_one_process_at_a_time(tmp_path):
    spool = Spool(tmp_path)
    spool.acquire()
    script = (
        "import sys; from pathlib import Path; from lightning_modules.tracking.spool import Spool;"
        "Spool(Path(sys.argv[1])).acquire()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "another process is still writing" in refused.stderr
    spool.release()
    subprocess.run(command, check=True)


def test_claiming_clears_what_a_crash_left_half_done(tmp_path):
    (tmp_path / "000000001.file.tmp").write_bytes(b"half")
    (tmp_path / "sending.tmp").mkdir()
    spool = Spool(tmp_path)
    spool.acquire()
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(UserInputError, match="another process"):
        Spool(tmp_path).acquire()
