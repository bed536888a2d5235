"""Balanced training by two processes (DDP): the step of one process that has the whole batch."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist

from lightning_modules.balancing.build import build_balancer
from lightning_modules.balancing.config import BalancingConfig
from lightning_modules.config import IntervalConfig
from lightning_modules.objective import BALANCING_STREAM
from tests.lightning_modules.balancing.problem import training_jacobian


class WholeBatch(pl.Callback):
    """Asserts that the gradient is that of the whole batch's Jacobian, made one task at a time, times the weights.

    Args:
        seen: Folder that gets a file with the weights for each step and process.
    """

    def __init__(self, seen: Path) -> None:
        self.seen = seen

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.losses, self.jacobian = training_jacobian(trainer, pl_module, batch, batch_idx)
        self.gramian = self.jacobian @ self.jacobian.T
        for tensor in (self.jacobian, self.losses, self.gramian):
            dist.all_reduce(tensor)
            tensor /= 2
        self.entropy = (pl_module.seed, BALANCING_STREAM, batch_idx)

    def expected_weights(self, module, twin):
        config, K = module.balancing, module.intervals.num_intervals
        if not config.uses_gradients:
            return twin.scalarizer(self.losses, *self.entropy)[1] * K
        whole = self.gramian if config.processes == "local" else self.jacobian @ self.jacobian.T
        return twin.weighting(whole, *self.entropy) * K

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        K = pl_module.intervals.num_intervals
        twin = build_balancer(pl_module.balancing, K, 1)
        if trainer.global_step == 0:  # methods with a memory have none yet
            expected = self.expected_weights(pl_module, twin)
            torch.testing.assert_close(pl_module.balancer.weights, expected, rtol=1e-6, atol=1e-9)
        gradient = torch.cat([p.grad.flatten() for p in pl_module.backbone.parameters() if p.grad is not None])
        combined = pl_module.balancer.weights.double() / K @ self.jacobian
        torch.testing.assert_close(gradient, combined, rtol=1e-5, atol=1e-8)
        torch.save(pl_module.balancer.weights, self.seen / f"{trainer.global_step}-{trainer.global_rank}.pt")


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "aligned_mtl", "gradients": "keep"},
        {"method": "aligned_mtl", "gradients": "second_pass"},
        {"method": "mgda", "gradients": "keep", "processes": "local"},
        {"method": "uw"},
        {"method": "famo"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_two_processes_take_the_step_of_one(make_denoiser, fit, tmp_path, settings):
    module = make_denoiser(intervals=IntervalConfig(bounds=[0, 100, 300, 1000]), balancing=BalancingConfig(**settings))
    training = {"strategy": "ddp_spawn", "devices": 2, "use_distributed_sampler": False, "precision": "64-true"}
    fit(module, WholeBatch(tmp_path), steps=2, batch_size=18, **training)
    assert len(list(tmp_path.iterdir())) == 4
    for step in range(2):
        first, second = (torch.load(tmp_path / f"{step}-{rank}.pt") for rank in (0, 1))
        assert torch.equal(first, second)
        assert (first != 1).any()
