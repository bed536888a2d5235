"""Tests for `experiments/trainings.py`: children are stood in for by small programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from experiments import trainings
from experiments.trainings import Training, run_trainings


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Makes the pool run ``python FILE <arguments>`` instead of a training; returns a writer of FILE."""
    path = tmp_path / "child.py"
    popen = subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, str(path), *command[4:]], **options)

    monkeypatch.setattr(trainings.subprocess, "Popen", start)
    return lambda code: path.write_text(textwrap.dedent(code))


def jobs(tmp_path, *names):
    return [Training(name, [str(tmp_path / name)], tmp_path / "logs" / f"{name}.log") for name in names]


def test_all_trainings_run_and_their_words_are_kept(program, tmp_path, capsys):
    program("""
        import os, sys, pathlib
        print('{"step": 5, "max_steps": 10, "loss": null}')
        print("a word", os.environ["OMP_NUM_THREADS"])
        print("a complaint", file=sys.stderr)
        pathlib.Path(sys.argv[1]).write_text("ran")
    """)
    listed = jobs(tmp_path, "a", "b", "c")
    assert run_trainings(listed, workers=2) == []
    threads = max(1, os.cpu_count() // 2)
    for job in listed:
        assert (tmp_path / job.name).read_text() == "ran"
        assert sorted(job.log.read_text().splitlines()) == ["a complaint", f"a word {threads}"]
    said = capsys.readouterr().out
    assert all(f"{job.name}: done" in said for job in listed)


def test_after_a_failure_no_further_training_starts(program, tmp_path):
    program("""
        import sys, pathlib
        pathlib.Path(sys.argv[1]).touch()
        sys.exit("this went wrong")
    """)
    listed = jobs(tmp_path, "a", "b", "c")
    (failed,) = run_trainings(listed, workers=1)
    assert failed is listed[0]
    assert failed.log_tail() == "this went wrong"
    assert not (tmp_path / "b").exists()


def test_an_interrupt_reaches_running_trainings_which_may_finish(tmp_path):
    (tmp_path / "child.py").write_text(
        textwrap.dedent("""
            import pathlib, sys, time
            pathlib.Path(sys.argv[1] + ".started").touch()
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pathlib.Path(sys.argv[1]).write_text("closed")
        """)
    )
    (tmp_path / "pool.py").write_text(
        textwrap.dedent(f"""
            import pathlib, subprocess, sys
            from experiments import trainings
            popen = subprocess.Popen
            child = {str(tmp_path / "child.py")!r}
            trainings.subprocess.Popen = lambda command, **o: popen([sys.executable, child, *command[4:]], **o)
            folder = pathlib.Path({str(tmp_path)!r})
            trainings.run_trainings(
                [trainings.Training(n, [str(folder / n)], folder / (n + ".log")) for n in "abc"], workers=2
            )
        """)
    )
    pool = subprocess.Popen([sys.executable, str(tmp_path / "pool.py")], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.started"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pool.send_signal(signal.SIGINT)
    _, complaint = pool.communicate(timeout=30)
    assert "KeyboardInterrupt" in complaint
    assert [(tmp_path / name).read_text() for name in "ab"] == ["closed", "closed"]
    assert not (tmp_path / "c.started").exists()
