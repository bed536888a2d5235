"""Tests for `experiments/sweeping/locks.py`."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from experiments.sweeping.locks import sole_sweep
from lightning_modules.errors import UserInputError


def test_a_second_sweep_is_refused(tmp_path):
    refused = pytest.raises(UserInputError, match="another `dtr-lab sweep` works on this sweep")
    with sole_sweep(tmp_path), refused, sole_sweep(tmp_path):
        pass
    with sole_sweep(tmp_path):
        pass


def test_trainings_that_were_left_behind_are_waited_for(tmp_path, capsys):
    with sole_sweep(tmp_path) as inherited:
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"], pass_fds=inherited)
    start = time.monotonic()
    with sole_sweep(tmp_path):
        assert left.poll() is not None or time.monotonic() - start > 0.5
    assert left.wait(10) == 0
    assert "Waiting for trainings that an interrupted sweep left behind" in capsys.readouterr().out
