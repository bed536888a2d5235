"""Signals that come in the middle of something are delivered at its end."""

from __future__ import annotations

import signal
import threading

import pytest

from lightning_modules.interrupts import interrupts_held_back


def test_an_interrupt_waits_for_the_end():
    done = []

    def work():
        with interrupts_held_back():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["all of it"]


def test_a_termination_reaches_the_handler_from_before():
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with interrupts_held_back():
            signal.raise_signal(signal.SIGTERM)
            assert came == []
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_a_signal_nothing_changes():
    before = signal.getsignal(signal.SIGINT)
    with interrupts_held_back():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_inside_comes_out_and_handlers_are_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="inside"), interrupts_held_back():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_go_on_as_ever():
    ran = []

    def work():
        with interrupts_held_back():
            ran.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [True]
