"""Affinities from measured look-aheads and fine-tunings: back to the truth, with errors that hold."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.transfer import (
    fine_tuning_affinity,
    look_ahead_affinity,
    predicted_look_ahead,
    relative_to_own,
    transfer_film,
)
from lightning_modules.errors import UserInputError
from lightning_modules.tracking.records import FINE_TUNING
from tests.analysis.measured import K, run_with, transfer_rows

SAVED = np.random.default_rng(0).uniform(-0.3, 0.5, (K, K))


def test_the_truth_comes_back_from_the_task_trained_on_to_the_one_looked_at(tmp_path):
    run = run_with(tmp_path, transfers=[transfer_rows(SAVED, predicted=2 * SAVED)])
    found = look_ahead_affinity(run)
    assert found.dims == ("task", "other_task")
    np.testing.assert_allclose(found.values, SAVED)
    np.testing.assert_allclose(predicted_look_ahead(run).values, 2 * SAVED)
    assert found["interval"].values.tolist() == run["interval"].values.tolist()
    assert set(found["log_snr"].dims) == {"task"}
    assert found["standard_error"].isnull().all(), "one draw has no spread"
    assert found.attrs["directed"]


def test_draws_are_pooled_by_their_losses_not_averaged_as_ratios(tmp_path):
    low, high = np.full(K, 0.1), np.full(K, 0.3)
    rows = [transfer_rows(SAVED, repeat=0, loss=low), transfer_rows(0 * SAVED, repeat=1, loss=high)]
    np.testing.assert_allclose(look_ahead_affinity(run_with(tmp_path, transfers=rows)).values, SAVED / 4)


def test_the_error_is_the_jackknifes_and_covers_the_truth(tmp_path):
    rng = np.random.default_rng(1)
    repeats, spread = 12, 0.05
    draws = SAVED + spread * rng.standard_normal((repeats, K, K))
    run = run_with(tmp_path, transfers=[transfer_rows(draw, repeat=r) for r, draw in enumerate(draws)])
    found = look_ahead_affinity(run)
    # With equal losses the ratio is the mean, whose jackknife error is the usual one.
    np.testing.assert_allclose(found.values, draws.mean(0))
    np.testing.assert_allclose(found["standard_error"].values, draws.std(0, ddof=1) / np.sqrt(repeats))
    assert np.mean(np.abs(found.values - SAVED) <= 2.2 * found["standard_error"].values) > 0.9


def test_checkpoints_are_averaged_or_told_apart(tmp_path):
    first = [transfer_rows(SAVED + 0.1 * r, step=100, repeat=r) for r in range(2)]
    second = [transfer_rows(3 * SAVED + 0.1 * r, step=500, repeat=r) for r in range(3)]  # one more draw than the first
    run = run_with(tmp_path, transfers=first + second)
    one, other = (look_ahead_affinity(run, step=step) for step in (100, 500))
    np.testing.assert_allclose(one.values, SAVED + 0.05)
    np.testing.assert_allclose(other.values, 3 * SAVED + 0.1)
    both = look_ahead_affinity(run)
    np.testing.assert_allclose(both.values, (one.values + other.values) / 2)
    np.testing.assert_allclose(
        both["standard_error"].values,
        np.hypot(one["standard_error"].values, other["standard_error"].values) / 2,
    )
    film = transfer_film(run)
    assert film["step"].values.tolist() == [100, 500]
    np.testing.assert_allclose(film.sel(step=500).values, other.values)
    np.testing.assert_allclose(film["standard_error"].sel(step=100).values, one["standard_error"].values)


def test_fine_tuning_after_any_number_of_updates_that_was_looked_at(tmp_path):
    rows = [transfer_rows(n * SAVED, measure=FINE_TUNING, updates=n) for n in (1, 4)]
    run = run_with(tmp_path, transfers=[*rows, transfer_rows(-SAVED)])
    np.testing.assert_allclose(fine_tuning_affinity(run, updates=1).values, SAVED)
    np.testing.assert_allclose(fine_tuning_affinity(run).values, 4 * SAVED)
    np.testing.assert_allclose(transfer_film(run, FINE_TUNING).isel(step=0).values, 4 * SAVED)
    np.testing.assert_allclose(look_ahead_affinity(run).values, -SAVED)
    with pytest.raises(UserInputError, match="has fine tuning updates 1, 4, not 3"):
        fine_tuning_affinity(run, updates=3)


def test_help_relative_to_what_training_on_the_task_itself_does(tmp_path):
    saved = np.random.default_rng(2).uniform(-0.3, 0.5, (K, K))
    np.fill_diagonal(saved, np.linspace(0.1, 0.8, K))
    saved[3, 3] = -0.1  # training on it did it no good: nothing to compare with
    draws = [saved + 0.01 * s for s in (-1, 0, 1)]
    affinity = look_ahead_affinity(
        run_with(tmp_path, transfers=[transfer_rows(d, repeat=r) for r, d in enumerate(draws)])
    )
    found = relative_to_own(affinity)
    own = np.where(np.diag(saved) > 0, np.diag(saved), np.nan)
    np.testing.assert_allclose(found.values, saved / own)
    np.testing.assert_allclose(found["standard_error"].values, affinity["standard_error"].values / own)
    assert found["interval"].equals(affinity["interval"])
    assert found.dims == affinity.dims


def test_what_was_not_measured_says_how_to_measure_it(tmp_path):
    run = run_with(tmp_path, transfers=[transfer_rows(SAVED)])
    with pytest.raises(UserInputError, match="no measured fine tuning: measure it with `dtr-lab affinity"):
        fine_tuning_affinity(run)
    with pytest.raises(UserInputError, match="has look ahead step 100, not 7"):
        look_ahead_affinity(run, step=7)
    with pytest.raises(UserInputError, match="no first-order form"):
        predicted_look_ahead(run)
