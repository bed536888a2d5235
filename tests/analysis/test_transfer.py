"""Affinities from measured look-aheads and fine-tunings: back to the truth, with errors that hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.transfer import (
    fine_tuning_affinity,
    first_order_slope,
    look_ahead_affinity,
    predicted_look_ahead,
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
    assert film["first_step"].values.tolist() == [100, 500] == film["last_step"].values.tolist()
    np.testing.assert_allclose(film.isel(window=1).values, other.values)
    np.testing.assert_allclose(film["standard_error"].isel(window=0).values, one["standard_error"].values)


def test_fine_tuning_after_any_number_of_updates_that_was_looked_at(tmp_path):
    rows = [transfer_rows(n * SAVED, measure=FINE_TUNING, updates=n) for n in (1, 4)]
    run = run_with(tmp_path, transfers=[*rows, transfer_rows(-SAVED)])
    np.testing.assert_allclose(fine_tuning_affinity(run, updates=1).values, SAVED)
    np.testing.assert_allclose(fine_tuning_affinity(run).values, 4 * SAVED)
    np.testing.assert_allclose(transfer_film(run, FINE_TUNING).isel(window=0).values, 4 * SAVED)
    np.testing.assert_allclose(look_ahead_affinity(run).values, -SAVED)
    with pytest.raises(UserInputError, match="has fine tuning updates 1, 4, not 3"):
        fine_tuning_affinity(run, updates=3)


def with_own_effect(rng):
    saved = rng.uniform(-0.3, 0.5, (K, K))
    np.fill_diagonal(saved, np.linspace(0.2, 0.8, K))
    return saved


def test_effects_relative_to_what_training_on_the_task_itself_does(tmp_path):
    rng = np.random.default_rng(2)
    saved = with_own_effect(rng)
    saved[3, 3] = -0.1  # training on it did it no good: nothing to compare with
    saved[4, 4] = 0.02  # so little that the draws below cannot tell it from nothing
    draws = saved + 0.05 * rng.standard_normal((5, K, K))
    run = run_with(tmp_path, transfers=[transfer_rows(d, repeat=r) for r, d in enumerate(draws)])
    found = look_ahead_affinity(run, relative=True)
    mean = draws.mean(0)
    own = np.where(np.isin(np.arange(K), [3, 4]), np.nan, np.diag(mean))
    np.testing.assert_allclose(found.values, mean / own)
    without = np.stack([np.delete(draws, r, 0).mean(0) for r in range(5)])
    ratios = without / np.einsum("rkk->rk", without)[:, None, :]
    expected = np.where(np.isnan(own), np.nan, np.sqrt(4 / 5 * ((ratios - ratios.mean(0)) ** 2).sum(0)))
    np.testing.assert_allclose(found["standard_error"].values, expected, atol=1e-12)
    assert np.diag(found["standard_error"].values)[0] == pytest.approx(0, abs=1e-12), "a ratio to itself is certain"
    assert (found.dims, found.attrs["units"]) == (("task", "other_task"), 5)
    single = run_with(tmp_path / "single", transfers=[transfer_rows(draws[0])])
    np.testing.assert_allclose(
        look_ahead_affinity(single, relative=True).values,
        draws[0] / np.where(np.diag(draws[0]) > 0, np.diag(draws[0]), np.nan),
    )


def test_the_error_of_a_ratio_holds_also_for_a_noisy_denominator(tmp_path):
    """The numerator's error alone would cover about 60 % here."""
    rng = np.random.default_rng(5)
    saved = np.full((K, K), 0.6)
    np.fill_diagonal(saved, 0.5)
    inside, copies = [], 12
    for copy in range(copies):
        noise = 0.1 * rng.standard_normal((16, 1, K)) * np.eye(K) + 0.1 * rng.standard_normal((16, K, K))
        rows = [transfer_rows(draw, repeat=r) for r, draw in enumerate(saved + noise)]
        found = look_ahead_affinity(run_with(tmp_path / str(copy), transfers=rows), relative=True)
        off = ~np.eye(K, dtype=bool)
        inside += (np.abs(found.values - 1.2) <= 2.13 * found["standard_error"].values)[off].tolist()
    assert 0.90 < np.mean(inside) < 0.99


def test_runs_are_averaged_before_dividing_and_left_out_in_turn(tmp_path):
    rng = np.random.default_rng(3)
    each = [with_own_effect(rng) for _ in range(3)]
    runs = [run_with(tmp_path / str(n), transfers=[transfer_rows(s)]) for n, s in enumerate(each)]
    plain, relative = look_ahead_affinity(runs), look_ahead_affinity(runs, relative=True)
    np.testing.assert_allclose(plain.values, np.mean(each, axis=0))
    np.testing.assert_allclose(plain["standard_error"].values, stats.sem(each, axis=0), atol=1e-12)
    mean = np.mean(each, axis=0)
    np.testing.assert_allclose(relative.values, mean / np.diag(mean))
    without = np.stack([np.delete(each, r, 0).mean(0) for r in range(3)])
    ratios = without / np.einsum("rkk->rk", without)[:, None, :]
    np.testing.assert_allclose(
        relative["standard_error"].values, np.sqrt(2 / 3 * ((ratios - ratios.mean(0)) ** 2).sum(0)), atol=1e-12
    )
    assert plain.attrs["units"] == relative.attrs["units"] == 3


def test_a_film_has_the_checkpoints_that_all_runs_have(tmp_path):
    runs = [
        run_with(tmp_path / str(n), transfers=[transfer_rows((n + 1) * SAVED, step=step) for step in steps])
        for n, steps in enumerate(([100, 500], [500, 900]))
    ]
    film = transfer_film(runs)
    assert film["last_step"].values.tolist() == [500]
    np.testing.assert_allclose(film.values[0], 1.5 * SAVED)
    other = run_with(tmp_path / "other", transfers=[transfer_rows(SAVED, step=7)])
    with pytest.raises(UserInputError, match="no step that all"):
        transfer_film([runs[0], other])


def test_a_checkpoint_without_the_measurement_is_left_out(tmp_path):
    early = [transfer_rows(SAVED, measure=FINE_TUNING, updates=100, step=100, repeat=r) for r in range(2)]
    late = [transfer_rows(2 * SAVED + 0.1 * r, measure=FINE_TUNING, updates=200, step=500, repeat=r) for r in range(2)]
    run = run_with(tmp_path / "updates", transfers=early + late)
    found = fine_tuning_affinity(run)
    np.testing.assert_allclose(found.values, 2 * SAVED + 0.05)
    np.testing.assert_allclose(found["standard_error"].values, 0.05)
    predicted = [transfer_rows(SAVED, step=100, predicted=1.25 * SAVED), transfer_rows(SAVED, step=500)]
    mixed = run_with(tmp_path / "mixed", transfers=predicted)
    np.testing.assert_allclose(predicted_look_ahead(mixed).values, 1.25 * SAVED)
    assert first_order_slope(mixed) == pytest.approx(0.8)


def test_a_run_of_single_draws_does_not_switch_the_noise_off(tmp_path):
    rng = np.random.default_rng(6)
    saved = with_own_effect(rng)
    saved[4, 4] = 0.01
    runs = []
    for number, repeats in enumerate((6, 6, 1)):
        draws = saved + 0.2 * rng.standard_normal((repeats, K, K)) * (np.arange(K) == 4)
        draws[:, 4, 4] += 0.01 - draws[:, 4, 4].mean()
        rows = [transfer_rows(draw, repeat=r) for r, draw in enumerate(draws)]
        runs.append(run_with(tmp_path / str(number), transfers=rows))
    assert look_ahead_affinity(runs, relative=True)[:, 4].isnull().all()


def test_the_slope_tells_how_much_the_first_order_overstates(tmp_path):
    run = run_with(tmp_path, transfers=[transfer_rows(SAVED, predicted=1.25 * SAVED)])
    assert first_order_slope(run) == pytest.approx(0.8)


def test_what_was_not_measured_says_how_to_measure_it(tmp_path):
    run = run_with(tmp_path, transfers=[transfer_rows(SAVED)])
    with pytest.raises(UserInputError, match="no measured fine tuning: measure it with `dtr-lab affinity"):
        fine_tuning_affinity(run)
    with pytest.raises(UserInputError, match="has look ahead step 100, not 7"):
        look_ahead_affinity(run, step=7)
    with pytest.raises(UserInputError, match="no first-order form"):
        predicted_look_ahead(run)
