"""Tests for `lightning_modules/probes/channel_activation.py`."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from lightning_modules.probes.channel_activation import ChannelActivationProbe
from lightning_modules.tracking.records import CHANNEL_ACTIVATION, TABLES
from tests.conftest import UNET


class BlockSpy(pl.Callback):
    """Keeps every block's input and output of one step."""

    def __init__(self, step: int) -> None:
        self.step, self.seen, self.t = step, {}, None
        self.handles = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step + 1 == self.step:
            for index, block in enumerate(pl_module.backbone.blocks):
                self.handles.append(block.register_forward_hook(self.keep(f"blocks.{index}")))

    def keep(self, name):
        def hook(module, args, output):
            self.seen[name] = (args[0].detach().double().numpy(), output.detach().double().numpy())

        return hook

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.handles:
            self.t = pl_module.intervals.task_of(outputs["t"]).numpy()
        while self.handles:
            self.handles.pop().remove()


@pytest.mark.parametrize("method", ["baseline", "dtr"])
def test_the_moments_are_those_of_every_sample_and_token(make_denoiser, writer, fit, method):
    spy = BlockSpy(step=2)
    fit(make_denoiser(method), spy, ChannelActivationProbe(every_n_steps=2, threshold=0.3), steps=3)
    ((table, columns),) = writer.rows
    assert table == CHANNEL_ACTIVATION
    assert list(columns) == TABLES[CHANNEL_ACTIVATION].names
    assert len(columns["step"]) == 2 * 2 * 4  # blocks x sites x tasks
    for step, block, site, task, count, mean, square, active in zip(*columns.values(), strict=True):
        read, written = spy.seen[block]
        values = read if site == "input" else written - read
        members = values[spy.t == task].reshape(-1, 16)
        rms = np.sqrt(np.square(values).mean())
        assert step == 2
        assert count == len(members)
        np.testing.assert_allclose(mean, members.mean(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(square, np.square(members).mean(0), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(active, (np.abs(members) > 0.3 * rms).mean(0), atol=0.07)


class BranchSpy(pl.Callback):
    """Keeps what the first layer of each of a U-Net's residual branches reads and what the last one gives."""

    def __init__(self) -> None:
        self.seen, self.t = {}, None

    def on_fit_start(self, trainer, pl_module):
        for name in pl_module.backbone.block_channels:
            block = pl_module.backbone.get_submodule(name)
            block.norm1.register_forward_hook(lambda _, args, output, name=name: self.keep(name, "input", args[0]))
            block.conv2.register_forward_hook(lambda _, args, output, name=name: self.keep(name, "update", output))

    def keep(self, name, site, images):
        self.seen[name, site] = images.detach().double().permute(0, 2, 3, 1).numpy()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.t = pl_module.intervals.task_of(outputs["t"]).numpy()


@pytest.mark.parametrize("method", ["baseline", "dtr"])
def test_the_moments_of_a_unet_are_those_of_every_sample_and_pixel(make_denoiser, writer, fit, method):
    module, spy = make_denoiser(method, backbone=UNET), BranchSpy()
    fit(module, spy, ChannelActivationProbe(every_n_steps=2, threshold=0.3), steps=2)
    columns = writer.rows[0][1]
    blocks = module.backbone.block_channels
    assert len(columns["step"]) == len(blocks) * 2 * 4  # blocks x sites x tasks
    assert list(dict.fromkeys(columns["block"])) == list(blocks)
    for _, block, site, task, count, mean, square, active in zip(*columns.values(), strict=True):
        values = spy.seen[block, site]
        members = values[spy.t == task].reshape(-1, values.shape[-1])
        assert count == len(members)
        if site == "input":
            assert len(mean) == blocks[block]
        np.testing.assert_allclose(mean, members.mean(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(square, np.square(members).mean(0), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(
            active, (np.abs(members) > 0.3 * np.sqrt(np.square(values).mean())).mean(0), atol=0.07
        )
    dead = writer.metrics[0][1]["activation/dead_fraction"]
    assert dead > 0.3 if method == "dtr" else dead == 0


def test_masked_channels_read_nothing(make_denoiser, writer, fit):
    module = make_denoiser("dtr")
    fit(module, ChannelActivationProbe(every_n_steps=1), steps=2)
    masks = module.backbone.routing.block_masks(0)
    columns = writer.rows[0][1]
    for site, task, square in zip(columns["site"], columns["task"], columns["mean_square"], strict=True):
        low, high = module.intervals.bounds[task : task + 2]
        never = ~masks[low:high].any(0)
        if site == "input":
            assert (square[never] == 0).all()
            assert never.any()
    assert writer.metrics[0][1]["activation/dead_fraction"] > 0.3


def test_no_hook_is_left_behind_and_training_is_unchanged(make_denoiser, writer, fit):
    plain, probed = make_denoiser(), make_denoiser()
    fit(plain, steps=4)
    fit(probed, ChannelActivationProbe(every_n_steps=1), steps=4)
    assert all(not block._forward_hooks for block in probed.backbone.blocks)
    for (name, p), q in zip(plain.state_dict().items(), probed.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_the_effective_number_of_channels_is_the_participation_ratio(make_denoiser, writer, fit):
    fit(make_denoiser(), ChannelActivationProbe(every_n_steps=1), steps=2)
    columns = writer.rows[0][1]
    ratios = [
        np.sum(square, dtype=np.float64) ** 2 / np.square(square, dtype=np.float64).sum()
        for site, square in zip(columns["site"], columns["mean_square"], strict=True)
        if site == "input"
    ]
    assert writer.metrics[0][1]["activation/effective_channels"] == pytest.approx(np.mean(ratios), rel=1e-4)
