"""Tests for `experiments/probing/budget.py`."""

import math
import os
import signal

import pytest

from experiments.probing.budget import Budget, _state, measure_batches


def measured(measure, **budget):
    numbers = []

    def note(number):
        numbers.append(number)
        return measure(number)

    return numbers, measure_batches(note, Budget(**{"batches": 10, **budget}))


def test_all_batches_are_measured_in_turn():
    assert measured(lambda number: None) == (list(range(1, 11)), (10, "batches"))


def test_the_precision_reached_ends_it_whenever_it_is_looked_at():
    errors = {4: 0.3, 8: 0.2}
    assert measured(errors.get, precision=0.2) == (list(range(1, 9)), (8, "precision"))
    assert measured(errors.get, precision=0.1)[1] == (10, "batches")


def test_time_runs_out_after_a_batch(monkeypatch):
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr("experiments.probing.budget.time.monotonic", lambda: float(next(clock)))
    assert measured(lambda number: None, minutes=1.5) == ([1, 2, 3], (3, "minutes"))


def test_the_first_interrupt_lets_the_batch_finish_and_the_second_does_not(capsys):
    def interrupted(number, times):
        if number == 2:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    assert measured(lambda number: interrupted(number, 1)) == ([1, 2], (2, "interrupted"))
    assert "finishing this batch" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        measured(lambda number: interrupted(number, 2))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("error", "budget", "says"),
    [
        (math.inf, Budget(100), "16:00 left"),
        # The error must halve, which takes four times as many batches, 12 more of 10 s.
        (0.4, Budget(100, precision=0.2), "standard error 0.400, 02:00 left"),
        (0.4, Budget(10, precision=0.2), "standard error 0.400, 01:00 left"),
        (0.4, Budget(100, minutes=1.0), "standard error 0.400, 00:20 left"),
        (0.1, Budget(100, precision=0.2), "standard error 0.100, 00:00 left"),
    ],
)
def test_the_time_left_is_that_of_the_limit_that_comes_first(error, budget, says):
    assert _state(error, 4, 40.0, budget) == says


def test_the_bar_shows_batches_and_precision(capsys):
    measured(lambda number: 0.25, batches=5)
    assert "5/5 batches" in (said := capsys.readouterr().err)
    assert "standard error 0.250" in said
