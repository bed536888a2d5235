"""A gradient probe that measures each scheduled step a second time, the slow and obvious way, and compares."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from lightning_modules.gradients import split_tasks
from lightning_modules.probes.gradient_conflict import GradientConflictProbe


class CheckedProbe(GradientConflictProbe):
    """Asserts that what is written equals the products of gradients computed group by group with `autograd.grad`.

    Args:
        seen: File that gets one line per comparison, also from other processes.
        tolerance: Of the Gramian over all layers, relative.
        settings: Of the probe.
    """

    def __init__(self, seen: Path, tolerance: float, **settings) -> None:
        super().__init__(**settings)
        self.seen = seen
        self.tolerance = tolerance
        self.forwards = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        due = (trainer.global_step + 1) % self.every_n_steps == 0 and batch_idx % trainer.accumulate_grad_batches == 0
        if due:
            with trainer.precision_plugin.forward_context():
                self.expected = self.slowly(pl_module, pl_module.draw(batch, batch_idx))
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert (self._recorder is not None or self._shares) == due

    def slowly(self, module, drawn):
        """Gramian and counts over all processes, and the mean losses."""
        num_groups = module.intervals.num_intervals * self.halves
        group = split_tasks(module.intervals.task_of(drawn.t), module.intervals.num_intervals, self.halves)
        parameters = [p for p in module.backbone.parameters() if p.requires_grad]
        losses = module.sample_losses(drawn).loss
        sums = torch.zeros(num_groups, sum(p.numel() for p in parameters), dtype=torch.float64)
        for index in range(num_groups):
            own = losses[group == index]
            if len(own):
                parts = torch.autograd.grad(own.sum(), parameters, retain_graph=True)
                sums[index] = torch.cat([part.flatten() for part in parts])
        counts = torch.bincount(group, minlength=num_groups)
        totals = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, group, losses.detach().double())
        if self.processes == "global" and dist.is_initialized():
            for tensor in (sums, counts, totals):
                dist.all_reduce(tensor)
        means = sums / counts.clamp_min(1)[:, None]
        return means @ means.T, counts, totals / counts

    def _write(self, trainer, module, gramian, losses):
        expected, counts, means = self.expected
        if self.processes == "local":
            expected = trainer.strategy.reduce(expected, reduce_op="mean")
            means = trainer.strategy.reduce(means, reduce_op="mean")
        assert gramian.coverage == 1
        assert torch.equal(gramian.counts, counts)
        error = (gramian.total() - expected).abs().max() / expected.abs().max()
        assert error < self.tolerance, error
        torch.testing.assert_close(losses, means.to(losses), rtol=1e-3, atol=0, equal_nan=True)
        with self.seen.open("a") as file:
            file.write(f"{self._step} {trainer.global_rank}\n")
        super()._write(trainer, module, gramian, losses)
