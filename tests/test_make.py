"""The Makefile and .ci/run where they go wrong on other people's machines, with stand-ins for what they call."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def stand_in(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_lists_the_targets():
    listed = make("help").stdout
    for target in ("test", "lint", "demo", "ui", "clean"):
        assert f"make {target} " in listed


def test_an_old_python_is_refused_with_a_cure(tmp_path):
    old = stand_in(tmp_path, "python3", '[ "$1" = --version ] && echo Python 3.9.18 && exit 0; exit 1')
    done = make("demo", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.9.18" in done.stderr
    assert "make demo PYTHON=python3.12" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_finished_installation_is_not_repeated(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    stand_in(venv / "bin", "python", f'echo "$@" >> {tmp_path}/calls')
    stand_in(venv / "bin", "dtr-lab", f'echo "dtr-lab $@" >> {tmp_path}/calls')
    for _ in range(2):
        assert make("ui", f"VENV={venv}", "ARGS=--port 7000").returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("install" in call for call in calls) == 1
    assert sum(call == "dtr-lab ui --port 7000" for call in calls) == 2
    assert next(call for call in calls if "install" in call).endswith("-c constraints.txt -e .")


@pytest.mark.parametrize(
    ("user", "apt", "message"),
    [("0", "exit 100", "could not be installed"), ("1000", "exit 0", "no root"), ("0", "exit 0", "")],
)
def test_ci_goes_on_without_a_browser(tmp_path, user, apt, message):
    for name in ("bash", "dirname", "env", "timeout", "sh"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    stand_in(tmp_path, "id", f"echo {user}")
    stand_in(tmp_path, "apt-get", apt)
    stand_in(tmp_path, "make", 'echo "make $@ with $MLFLOW_DISABLE_TELEMETRY"; exit 3')
    done = subprocess.run(
        [str(ROOT / ".ci" / "run")], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "make test with true\n"
    assert done.returncode == 3  # of make
    assert message in done.stderr
