"""Tests for `lightning_modules/timesteps.py`."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_modules.errors import UserInputError
from lightning_modules.timesteps import TimestepIntervals


@given(st.integers(1, 300), st.data())
def test_uniform_intervals_partition_all_timesteps_evenly(num_timesteps, data):
    num_intervals = data.draw(st.integers(1, num_timesteps))
    intervals = TimestepIntervals.uniform(num_timesteps, num_intervals)
    assert sum(intervals.widths) == num_timesteps
    assert max(intervals.widths) - min(intervals.widths) <= 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_task_of_agrees_with_a_search_by_hand(widths):
    bounds = [0, *np.cumsum(widths).tolist()]
    intervals = TimestepIntervals.explicit(bounds)
    t = torch.arange(bounds[-1])
    expected = [next(k for k in range(len(widths)) if bounds[k] <= step < bounds[k + 1]) for step in t.tolist()]
    assert intervals.task_of(t).tolist() == expected
    # A continuous t belongs to the timestep it has reached.
    assert intervals.task_of(t + 0.999).tolist() == expected


def test_log_snr_intervals_have_equal_widths_in_log_snr_where_the_schedule_is_fine_enough():
    log_snr = np.linspace(9.0, -9.0, 1000)
    assert TimestepIntervals.log_snr(log_snr, 4).bounds == (0, 250, 500, 750, 1000)
    curved = np.linspace(0, 1, 1000) ** 2 * -18 + 9
    intervals = TimestepIntervals.log_snr(curved, 6)
    for low, high in zip(intervals.bounds[:-1], intervals.bounds[1:], strict=True):
        edge = curved[high] if high < 1000 else curved[-1]
        assert curved[low] - edge == pytest.approx(3.0, abs=0.1)


def test_log_snr_intervals_are_never_empty_under_a_steep_schedule():
    log_snr = np.concatenate([[100.0], np.linspace(1.0, -1.0, 9)])
    intervals = TimestepIntervals.log_snr(log_snr, 8)
    assert min(intervals.widths) >= 1
    assert sum(intervals.widths) == 10


def test_stratified_counts_are_equal_and_the_batch_is_ordered_by_task():
    intervals = TimestepIntervals.explicit([0, 3, 100, 1000])
    t = intervals.sample_stratified(30, torch.Generator().manual_seed(0))
    task = intervals.task_of(t)
    assert torch.bincount(task).tolist() == [10, 10, 10]
    assert (task.diff() >= 0).all()


def test_remainders_are_spread_over_tasks_and_never_dropped():
    intervals = TimestepIntervals.uniform(1000, 8)
    generator = torch.Generator().manual_seed(0)
    totals = torch.zeros(8)
    for _ in range(800):
        counts = torch.bincount(intervals.task_of(intervals.sample_stratified(11, generator)), minlength=8)
        assert counts.sum() == 11
        assert set(counts.tolist()) == {1, 2}
        totals += counts
    # Expected 1100 each; the extra 3 of 8 have a standard deviation of sqrt(800 * 3/8 * 5/8) = 13.7.
    assert (totals - 1100).abs().max() < 5 * 13.7


def test_stratified_samples_are_uniform_within_an_interval():
    intervals = TimestepIntervals.explicit([0, 4, 1000])
    t = intervals.sample_stratified(8000, torch.Generator().manual_seed(1))
    counts = torch.bincount(t[t < 4], minlength=4).double()
    assert counts.sum() == 4000
    assert (counts - 1000).abs().max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_importance_restores_the_average_over_uniform_t():
    intervals = TimestepIntervals.explicit([0, 10, 300, 1000])
    t = torch.arange(1000)
    density = torch.cat([torch.full((width,), 1 / (3 * width)) for width in intervals.widths])
    value = torch.sin(t / 70).double()
    assert ((density * intervals.importance(t)).double() * value).sum() == pytest.approx(value.mean().item(), abs=1e-6)
    assert (TimestepIntervals.uniform(1000, 8).importance(t) == 1).all()


def test_sampling_depends_on_the_generator_alone():
    intervals = TimestepIntervals.uniform(1000, 8)
    first, second = (intervals.sample_stratified(64, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    uniform = intervals.sample_uniform(5000, torch.Generator().manual_seed(3))
    assert uniform.min() >= 0
    assert uniform.max() < 1000
    assert uniform.double().mean().item() == pytest.approx(499.5, abs=5 * 1000 / np.sqrt(12 * 5000))


@pytest.mark.parametrize("bounds", [[0], [1, 5], [0, 5, 5], [0, 7, 3]])
def test_bad_bounds_are_refused(bounds):
    with pytest.raises(UserInputError, match="increase strictly"):
        TimestepIntervals.explicit(bounds)


@pytest.mark.parametrize("count", [0, 11])
def test_impossible_numbers_of_intervals_are_refused(count):
    with pytest.raises(UserInputError, match="between 1 and 10"):
        TimestepIntervals.uniform(10, count)


def test_a_log_snr_that_rises_is_refused():
    with pytest.raises(UserInputError, match="decrease"):
        TimestepIntervals.log_snr([1.0, 2.0, 0.0], 2)


def test_a_task_alone_gives_timesteps_of_its_interval():
    intervals = TimestepIntervals.explicit([0, 3, 50, 100])
    drawn = intervals.sample_within(1, 4000, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(range(3, 50))
    assert stats.chisquare(torch.bincount(drawn)[3:]).pvalue > 1e-3
