"""Sums over single timesteps, against pandas."""

import itertools

import numpy as np
import pandas as pd
import pytest

from analysis.reading import loss_moments, shards
from lightning_modules.tracking import records
from tests.analysis import synthetic
from tests.analysis.synthetic import K, T

QUANTITIES = ("mse", "vb")


def random_windows(rng, steps, validations):
    """Rows of a training, shuffled, with timesteps that do not occur in some windows."""
    parts = []
    for split, times in (("train", steps), ("val", validations)):
        for step, quantity in itertools.product(times, QUANTITIES):
            timestep = np.flatnonzero(rng.random(T) < 0.4)
            count = rng.integers(1, 9, len(timestep))
            values = {"count": count, "sum": rng.random(len(timestep)), "sum_sq": rng.random(len(timestep))}
            labels = {"step": step, "window_start": step - 1, "split": split, "quantity": quantity}
            parts.append(pd.DataFrame({"timestep": timestep, **values}).assign(**labels))
    return pd.concat(parts).sample(frac=1, random_state=int(rng.integers(1000)))


@pytest.fixture
def written(tmp_path):
    """Two attempts in many shards, the second from step 40; the shards, and the rows that count."""
    rng = np.random.default_rng(0)
    attempts = random_windows(rng, range(5, 81, 5), (20, 40, 60)), random_windows(rng, range(45, 101, 5), (60, 80, 100))
    for attempt, (rows, resumed_from) in enumerate(zip(attempts, (0, 40), strict=True), 1):
        writer = synthetic.Shards(tmp_path, attempt, resumed_from)
        for part, piece in enumerate(np.array_split(np.arange(len(rows)), 7)):
            writer.write(records.TIMESTEP_LOSS, f"a{attempt}-{part}", rows.iloc[piece].to_dict("list"))
    counting = pd.concat([attempts[0].query("step <= 40"), attempts[1]])
    return shards.list_shards(tmp_path)[records.TIMESTEP_LOSS], counting


def sums(rows, by):
    return rows.groupby(by)[["count", "sum", "sum_sq"]].sum()


@pytest.mark.parametrize("group_size", [1, 40_000, 2**23])
def test_moments_are_sums_over_the_rows_that_count(written, group_size, monkeypatch):
    monkeypatch.setattr(shards, "_GROUP_BYTES", group_size)
    files, rows = written
    rows = rows.assign(task=rows["timestep"] * K // T, quarter=rows["timestep"] * 4 // T)
    for found, split in zip(loss_moments.read_losses(files, synthetic.manifest()), ("train", "val"), strict=True):
        own = rows[rows["split"] == split]
        steps = sorted(own["step"].unique())
        assert found[f"{split}_step"].values.tolist() == steps
        for dims in (("task",), ("task", "quarter")):
            name = f"{split}_quarter_loss" if "quarter" in dims else f"{split}_loss"
            order = ["quantity", "step", *dims]
            expected = sums(own, order).to_xarray().to_array("moment").fillna(0.0)
            np.testing.assert_allclose(found[name].sum(), expected.sum(), rtol=1e-12)
            got = found[name].rename({f"{split}_step": "step"}).sel({dim: expected[dim] for dim in dims})
            np.testing.assert_allclose(got.transpose("moment", *order), expected, rtol=1e-12)
        pooled = own if split == "train" else own[own["step"] == steps[-1]]
        for quantity in QUANTITIES:
            expected = sums(pooled[pooled["quantity"] == quantity], "timestep").reindex(range(T), fill_value=0.0)
            got = found[f"{split}_timestep_loss"].sel(quantity=quantity).transpose("timestep", "moment")
            np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_a_loss_that_diverged_stays_where_it_is(tmp_path):
    columns = synthetic.loss_columns("train", "dtr", 0, 100, 0)
    columns["sum"] = np.where(np.arange(T) == 60, np.nan, columns["sum"])
    synthetic.Shards(tmp_path).write(records.TIMESTEP_LOSS, "a", columns)
    (found,) = loss_moments.read_losses(shards.list_shards(tmp_path)[records.TIMESTEP_LOSS], synthetic.manifest())
    total = found["train_loss"].sel(quantity="mse", moment="sum")[0]
    assert total.isnull().values.tolist() == [task == 60 * K // T for task in range(K)]


def test_a_run_without_losses_has_none():
    assert loss_moments.read_losses([], synthetic.manifest()) == []
