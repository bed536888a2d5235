"""CKA from kept HSIC: ratios of sums, means over the timesteps of intervals, errors over batches."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.representation import representation_affinity, timestep_cka
from lightning_modules.errors import UserInputError
from tests.analysis import synthetic
from tests.analysis.measured import K, representation_rows, run_with

WIDTH = synthetic.T // K
TIMES = [t for low in range(0, synthetic.T, WIDTH) for t in (low + 3, low + 17)]
M = len(TIMES)


def psd(seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((M, 40))
    return x @ x.T / 40


def test_batches_add_up_before_the_division(tmp_path):
    batches = [{"blocks.0": psd(2 * b), "blocks.1": 3 * psd(2 * b + 1)} for b in range(3)]
    rows = [representation_rows(hsic, TIMES, batch=b) for b, hsic in enumerate(batches)]
    cka = timestep_cka(run_with(tmp_path, representations=rows))
    assert cka.dims == ("block", "probed_timestep", "other_probed_timestep")
    assert cka["probed_timestep"].values.tolist() == TIMES
    np.testing.assert_allclose(cka["log_snr"].values, np.linspace(8, -8, synthetic.T)[TIMES], atol=1e-6)
    for block in synthetic.CHANNELS:
        total = sum(hsic[block] for hsic in batches)
        scale = np.sqrt(np.diag(total))
        np.testing.assert_allclose(cka.sel(block=block).values, total / np.outer(scale, scale))


def test_intervals_are_means_over_pairs_of_different_timesteps(tmp_path):
    run = run_with(tmp_path, representations=[representation_rows({"blocks.0": psd(0), "blocks.1": psd(1)}, TIMES)])
    cka = timestep_cka(run).mean("block").values
    found = representation_affinity(run)
    for i in range(K):
        for j in range(K):
            pairs = [cka[a, b] for a in (2 * i, 2 * i + 1) for b in (2 * j, 2 * j + 1) if a != b]
            assert float(found[i, j]) == pytest.approx(np.mean(pairs))
    assert found["standard_error"].isnull().all(), "one batch"
    by_block = representation_affinity(run, by_block=True)
    np.testing.assert_allclose(by_block.mean("block").values, found.values)


def test_one_timestep_of_an_interval_is_like_itself_and_none_is_unknown(tmp_path):
    times = [5, WIDTH + 1, 3 * WIDTH]  # intervals 0, 1 and 3
    hsic = psd(0)[:3, :3]
    run = run_with(tmp_path, representations=[representation_rows({"blocks.0": hsic, "blocks.1": hsic}, times)])
    found = representation_affinity(run)
    assert [float(found[i, i]) for i in (0, 1, 3)] == [1.0, 1.0, 1.0]
    assert found[2].isnull().all()
    assert found[:, 4].isnull().all()


def test_a_timestep_without_a_representation_leaves_the_others_of_its_interval(tmp_path):
    hsic = psd(0)
    silent = hsic.copy()
    silent[2], silent[:, 2] = 0.0, 0.0  # the first timestep of interval 1
    kept = [i for i in range(M) if i != 2]
    rows = [representation_rows({"blocks.0": silent, "blocks.1": silent}, TIMES)]
    found = representation_affinity(run_with(tmp_path / "silent", representations=rows))
    less = [
        representation_rows({name: hsic[np.ix_(kept, kept)] for name in synthetic.CHANNELS}, [TIMES[i] for i in kept])
    ]
    expected = representation_affinity(run_with(tmp_path / "less", representations=less))
    off = ~np.eye(K, dtype=bool)
    np.testing.assert_allclose(found.values[off], expected.values[off])


def test_the_error_is_the_jackknifes_over_batches(tmp_path):
    rng = np.random.default_rng(3)
    batches = [psd(0) * rng.uniform(0.8, 1.2) + 0.1 * np.diag(rng.uniform(0, 1, M)) for _ in range(5)]
    rows = [representation_rows({"blocks.0": h, "blocks.1": h}, TIMES, batch=b) for b, h in enumerate(batches)]
    found = representation_affinity(run_with(tmp_path / "all", representations=rows))
    without = [
        representation_affinity(run_with(tmp_path / str(b), representations=rows[:b] + rows[b + 1 :])).values
        for b in range(5)
    ]
    spread = np.sqrt(4 / 5 * ((without - np.mean(without, axis=0)) ** 2).sum(0))
    np.testing.assert_allclose(found["standard_error"].values, spread, atol=1e-12)


def test_checkpoints_may_differ_in_timesteps_and_the_last_is_the_default(tmp_path):
    early = representation_rows({"blocks.0": psd(0), "blocks.1": psd(0)}, TIMES, step=100)
    other = [t + 1 for t in TIMES[:4]]
    late = representation_rows({"blocks.0": psd(1)[:4, :4], "blocks.1": psd(1)[:4, :4]}, other, step=200)
    run = run_with(tmp_path, representations=[early, late])
    assert timestep_cka(run)["probed_timestep"].values.tolist() == other
    assert timestep_cka(run, step=100)["probed_timestep"].values.tolist() == TIMES
    with pytest.raises(UserInputError, match="representations of step 100, 200, not 7"):
        timestep_cka(run, step=7)


def test_what_was_not_measured_says_how_to_measure_it(tmp_path):
    with pytest.raises(UserInputError, match="--measures representation"):
        timestep_cka(run_with(tmp_path))
