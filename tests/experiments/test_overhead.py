"""Tests for `experiments/benchmarks/overhead.py`: that it measures what it says, not how fast anything is."""

import json
import math
import subprocess
import sys


def test_it_prints_one_object_with_both_sides_of_one_run():
    command = [sys.executable, "-m", "experiments.benchmarks.overhead", "--json"]
    options = ["--rounds=1", "--steps=6", "--steps-every=2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"ratio_default", "ratio_every_step", "arithmetic_every_step", "steps"} <= set(result)
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    assert result["steps"] == 2 * 6 + 2 * 2
