"""Tests for what `dtr-lab sweep` asks of `experiments/trainings.py`; children are stood in for by small programs."""

from __future__ import annotations

import os
import threading
import time

import pytest

from experiments.trainings import run_trainings
from tests.experiments.test_trainings import jobs, program

__all__ = ["program"]  # a fixture

FAILS_AT_B = """
    import pathlib, sys
    path = pathlib.Path(sys.argv[1])
    path.touch()
    sys.exit("as planned" if path.name == "b" else 0)
"""


def test_others_go_on_after_a_failure(program, tmp_path, capsys):
    program(FAILS_AT_B)
    listed = jobs(tmp_path, "a", "b", "c", "d")
    ended = []
    failed = run_trainings(listed, 1, go_on=True, total=4, ended=lambda job, succeeded: ended.append((job, succeeded)))
    assert failed == [listed[1]]
    assert ended == [(job, job.name != "b") for job in listed]
    assert all((tmp_path / name).exists() for name in "abcd")
    assert "b: failed (1)" in capsys.readouterr().out


def test_the_next_training_may_depend_on_those_that_ended(program, tmp_path):
    program(FAILS_AT_B)
    results: list[str] = []

    def until_failure():
        for job in jobs(tmp_path, *"abcdef"):
            if "b" in results:
                return
            yield job

    def ended(job, succeeded):
        results.append("" if succeeded else job.name)

    (failed,) = run_trainings(until_failure(), 1, go_on=True, ended=ended)
    assert failed.name == "b"
    assert not (tmp_path / "c").exists()


def test_what_the_caller_raises_comes_back_after_the_running_ones_ended(program, tmp_path):
    program("""
        import pathlib, sys, time
        path = pathlib.Path(sys.argv[1])
        time.sleep(1.0 if path.name == "a" else 0)
        path.touch()
    """)

    def ended(job, succeeded):
        raise ValueError(f"no use for {job.name}")

    with pytest.raises(ValueError, match="no use for b"):
        run_trainings(iter(jobs(tmp_path, *"abc")), 2, ended=ended)
    assert (tmp_path / "a").exists()
    assert not (tmp_path / "c").exists()


def test_calls_come_one_at_a_time(program, tmp_path):
    program("pass")
    inside = threading.Lock()

    def ended(job, succeeded):
        assert inside.acquire(blocking=False)
        time.sleep(0.05)
        inside.release()

    assert run_trainings(iter(jobs(tmp_path, *"abcdef")), 3, total=6, ended=ended) == []


def test_descriptors_are_inherited(program, tmp_path):
    program("import os, sys; os.fstat(int(open(sys.argv[1] + '.fd').read()))")
    with (tmp_path / "file").open("w") as file:
        for name in "ab":
            (tmp_path / f"{name}.fd").write_text(str(file.fileno()))
        assert run_trainings(jobs(tmp_path, "a"), 1, inherited=[file.fileno()]) == []
        assert len(run_trainings(jobs(tmp_path, "b"), 1)) == 1
    assert os.path.exists(tmp_path / "logs" / "a.log")


def test_nothing_to_do_is_no_error():
    assert run_trainings([], 2) == []
    assert run_trainings(iter([]), 2, total=0) == []
