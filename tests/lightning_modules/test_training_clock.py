"""The clock counts training steps alone, where curves are measured, and goes on after a resume."""

from __future__ import annotations

import time

import pytest
import pytorch_lightning as pl

from lightning_modules import training_clock
from lightning_modules.tracking.records import TABLES, TRAINING_TIME
from lightning_modules.training_clock import TrainingClock


class Ticking:
    """A clock that moves only when it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class Spends(pl.Callback):
    """Spends 1 s in each step, and 50 s in everything between steps."""

    def __init__(self, clock: Ticking) -> None:
        self.clock = clock

    def on_before_optimizer_step(self, *_):
        self.clock.now += 1.0

    def on_train_batch_end(self, *_):
        self.clock.now += 50.0

    def on_validation_start(self, *_):
        self.clock.now += 50.0


@pytest.fixture
def rows(writer, monkeypatch):
    monkeypatch.setattr(training_clock, "writer_of", lambda trainer: writer)

    def written() -> list[tuple[int, float]]:
        found = [columns for table, columns in writer.rows if table == TRAINING_TIME]
        assert all(list(columns) == TABLES[TRAINING_TIME].names for columns in found)
        return [(columns["step"][0], columns["seconds"][0]) for columns in found]

    return written


def test_only_steps_count_and_rows_come_where_curves_have_points(make_denoiser, rows, fit, monkeypatch):
    spends = Spends(Ticking(monkeypatch))
    # The clock comes last here, and puts itself before the other.
    fit(
        make_denoiser(),
        spends,
        TrainingClock(),
        steps=7,
        limit_val_batches=1,
        val_check_interval=3,
        log_every_n_steps=2,
    )
    assert rows() == [(2, 2.0), (3, 3.0), (4, 4.0), (6, 6.0), (7, 7.0)]


def test_accumulated_batches_count_towards_their_step(make_denoiser, rows, fit, monkeypatch):
    clock = Ticking(monkeypatch)

    class Batch(pl.Callback):
        def on_after_backward(self, *_):
            clock.now += 1.0

    fit(make_denoiser(), Batch(), TrainingClock(), steps=2, accumulate_grad_batches=3, log_every_n_steps=1)
    assert rows() == [(1, 3.0), (2, 6.0)]


def test_a_resumed_training_goes_on_counting(make_denoiser, rows, fit, monkeypatch):
    spends = Spends(Ticking(monkeypatch))
    first = TrainingClock()
    fit(make_denoiser(), spends, first, steps=3, log_every_n_steps=50)
    second = TrainingClock()
    second.load_state_dict(first.state_dict())
    fit(make_denoiser(), spends, second, steps=2, log_every_n_steps=50)
    assert rows() == [(3, 3.0), (2, 5.0)]
