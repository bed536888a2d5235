"""What each of two processes does in `test_processes.py`: ``python -m tests.lightning_modules.gradients.workers``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_modules.gradients import GramianRecorder
from tests.lightning_modules.gradients.support import Model, normal, parameter, shaken, squares

BATCH, GROUPS = 8, 5
HALVES = (torch.tensor([0, 0, 1, 0]), torch.tensor([1, 4, 2, 1]))
"""Groups of the two processes: of unequal composition, some empty in one of them, and group 3 in both."""


def network() -> nn.Module:
    """With a tied layer, a normalised weight, and one of each kind of operator."""
    torch.manual_seed(0)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.norm(self.tied(self.tied(x).tanh())) * self.gamma
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.last(torch.einsum("bnd,de->bne", x, self.unknown).mean(1))

    return shaken(
        Model(
            forward,
            embedding=nn.Embedding(9, 6),
            tied=nn.Linear(6, 6),
            norm=nn.LayerNorm(6),
            gamma=parameter(6),
            conv=nn.Conv1d(6, 6, 3, padding=1),
            unknown=parameter(6, 6),
            last=nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)),
        )
    )


def tokens() -> torch.Tensor:
    return torch.randint(0, 9, (BATCH, 5), generator=torch.Generator().manual_seed(0))


def weights() -> torch.Tensor:
    return normal(BATCH).abs()


def run(rank: int, folder: Path) -> None:
    """Measures one training step in this process, in each way, and saves what came of it."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    model = network()
    parallel = DistributedDataParallel(model)
    own = slice(4 * rank, 4 * rank + 4)
    x, weight = tokens()[own], weights()[own]
    results = {}
    for name, settings in {
        "global mean": {},
        "global sum": {"reduction": "sum"},
        "retained": {"retain": True},
        "local": {"processes": "local"},
    }.items():
        model.zero_grad(set_to_none=True)
        recorder = GramianRecorder(model, HALVES[rank], GROUPS, **settings)
        with recorder:
            losses = squares(parallel(x)) * weight
            getattr(losses, settings.get("reduction", "mean"))().backward()
        gramian = recorder.result()
        grad = {key: p.grad for key, p in model.named_parameters()}
        results[name] = (gramian.layers, gramian.values, gramian.counts, gramian.coverage, grad)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(int(sys.argv[1]), Path(sys.argv[2]))
