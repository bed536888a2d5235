"""Tests for `lightning_modules/probes/timestep_loss.py`."""

import numpy as np
import pytorch_lightning as pl
import torch

from lightning_modules.probes.timestep_loss import TimestepLossProbe
from lightning_modules.tracking.records import TABLES, TIMESTEP_LOSS


class Spy(pl.Callback):
    """Remembers every sample's timestep and loss."""

    def __init__(self) -> None:
        self.t, self.mse = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.t.append(outputs["t"])
        self.mse.append(outputs["mse"])


def test_the_moments_are_those_of_every_sample_in_the_window(make_denoiser, writer, fit):
    spy = Spy()
    fit(make_denoiser(), spy, TimestepLossProbe(every_n_steps=3), steps=5)
    windows = [columns for table, columns in writer.rows if table == TIMESTEP_LOSS]
    assert [(rows["window_start"][0], rows["step"][0]) for rows in windows] == [(0, 3), (3, 5)]
    for rows, part in zip(windows, (slice(0, 3), slice(3, 5)), strict=True):
        t, mse = torch.cat(spy.t[part]).numpy(), torch.cat(spy.mse[part]).double().numpy()
        assert list(rows) == TABLES[TIMESTEP_LOSS].names
        assert set(rows["split"]) == {"train"}
        assert rows["timestep"].tolist() == sorted(set(t.tolist()))
        for timestep, count, total, squares in zip(
            rows["timestep"], rows["count"], rows["sum"], rows["sum_sq"], strict=True
        ):
            members = mse[t == timestep]
            assert count == len(members)
            np.testing.assert_allclose([total, squares], [members.sum(), np.square(members).sum()])


def test_validation_rows_hold_the_fixed_measurement(make_denoiser, writer, fit):
    module = make_denoiser()
    fit(module, TimestepLossProbe(), steps=4, limit_val_batches=1, val_check_interval=2)
    val = [rows for _, rows in writer.rows if rows["split"][0] == "val"]
    assert [rows["step"][0] for rows in val] == [2, 4]
    assert val[0]["timestep"].tolist() == val[1]["timestep"].tolist(), "same timesteps at every step"
    assert val[0]["count"].sum() == 256 * module.validation.repeats
    np.testing.assert_allclose(val[1]["sum"].sum(), module.validation_moments[0, 1].sum().item())


def test_gradient_accumulation_counts_steps_not_batches(make_denoiser, writer, fit):
    fit(make_denoiser(), TimestepLossProbe(every_n_steps=2), steps=4, accumulate_grad_batches=2)
    assert [(rows["window_start"][0], rows["step"][0]) for _, rows in writer.rows] == [(0, 2), (2, 4)]
    assert [rows["count"].sum() for _, rows in writer.rows] == [64, 64]


def test_zero_turns_it_off(make_denoiser, writer, fit):
    fit(make_denoiser(), TimestepLossProbe(every_n_steps=0), steps=2, limit_val_batches=1)
    assert writer.rows == []
