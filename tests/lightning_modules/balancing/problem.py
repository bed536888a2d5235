"""A small DiT whose tasks conflict, and the slow way to a balanced step: TorchJD on the whole Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchjd import aggregation

from lightning_modules.backbones.dit import DiT, DiTConfig
from lightning_modules.balancing.gramian_weights import SUMS_OF_GRADIENTS
from lightning_modules.seeding import seeded_global
from tests.lightning_modules.gradients.support import shaken

K, BATCH = 4, 16
TASK = torch.arange(K).repeat_interleave(BATCH // K)
UNEVEN = torch.tensor([3, 0, 1, 1, 2, 0, 3, 3, 3, 1, 2, 0, 0, 3, 1, 3])
"""Unordered, and three to six samples of each task."""
ENTROPY = (5, 3, 2)


def network() -> nn.Module:
    torch.manual_seed(0)
    config = DiTConfig(
        input_size=8,
        patch_size=4,
        in_channels=1,
        hidden_size=16,
        depth=2,
        num_heads=2,
        num_classes=3,
        learn_sigma=False,
    )
    return shaken(DiT(config))


class Problem:
    """Losses of one batch, in which tasks pull the output's mean in opposite directions, at different strengths."""

    def __init__(self, task: Tensor = TASK) -> None:
        generator = torch.Generator().manual_seed(1)
        self.task = task
        self.x = torch.randn(len(task), 1, 8, 8, generator=generator, dtype=torch.float64)
        self.t = task * 250 + torch.randint(0, 250, (len(task),), generator=generator)
        self.y = torch.randint(0, 3, (len(task),), generator=generator)
        pull = torch.tensor([2.0, -1.5, 1.0, -3.0], dtype=torch.float64)
        self.target = pull[task].view(-1, 1, 1, 1) + 0.3 * torch.randn(self.x.shape, generator=generator).double()

    def losses(self, model: nn.Module, part: slice = slice(None)) -> Tensor:
        """Losses (B,) of the samples."""
        output = model(self.x[part], self.t[part], self.y[part])
        return (output - self.target[part]).square().flatten(1).mean(1)

    def jacobian(self, model: nn.Module) -> Tensor:
        """Gradients (K, P) of the tasks' losses, one at a time: K times their parts of the mean loss."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        losses, rows = self.losses(model), []
        for k in range(K):
            task_loss = losses[self.task == k].sum() * (K / len(losses))
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(task_loss, parameters, retain_graph=True)]))
        return torch.stack(rows)


def aggregators() -> dict[str, aggregation.Aggregator]:
    """TorchJD's own, by our names, new."""
    return {
        "pcgrad": aggregation.PCGrad(),
        "nash_mtl": aggregation.NashMTL(K),
        "cagrad": aggregation.CAGrad(c=0.4),
        "mgda": aggregation.MGDA(),
        "imtl_g": aggregation.IMTLG(),
        "aligned_mtl": aggregation.AlignedMTL(),
        "upgrad": aggregation.UPGrad(),
        "config": aggregation.ConFIG(),
        "gradvac": aggregation.GradVac(),
    }


def torchjd_gradient(method: str, jacobian: Tensor, aggregator: aggregation.Aggregator | None = None) -> Tensor:
    """What TorchJD makes of the Jacobian, (P,); of sums the mean, as ours."""
    with seeded_global(*ENTROPY):
        combined = (aggregator or aggregators()[method])(jacobian)
    return combined / K if method in SUMS_OF_GRADIENTS else combined


def gradient(model: nn.Module) -> Tensor:
    """``.grad`` of all trained parameters, (P,)."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def training_jacobian(trainer, module, batch, batch_idx) -> tuple[Tensor, Tensor]:
    """Task losses (K,) of a training batch, and their gradients (K, P) by the backbone, one at a time."""
    with trainer.precision_plugin.forward_context():
        drawn, losses = module.step_losses(batch, batch_idx)
        weighted = losses.loss * module.importance(drawn.t)
    task, K = module.intervals.task_of(drawn.t), module.intervals.num_intervals
    parameters = [p for p in module.backbone.parameters() if p.requires_grad]
    losses = torch.stack([weighted[task == k].sum() * K / len(task) for k in range(K)])
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return losses.detach(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
