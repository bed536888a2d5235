"""Every measured affinity finds the groups of a problem that was built of two.

The tasks of a group want the same linear map, those of the other group its opposite; representations of a group are
noisy copies of one another. What is measured goes through the schema that the command writes and back.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from analysis.clustering import affinity_units, cluster_intervals
from analysis.representation import representation_affinity
from analysis.transfer import fine_tuning_affinity, look_ahead_affinity
from lightning_modules.denoiser import NoisedBatch
from lightning_modules.representation import unbiased_hsic
from lightning_modules.task_transfer import Transfer, TransferMeter
from lightning_modules.timesteps import TimestepIntervals
from lightning_modules.tracking.records import FINE_TUNING, LOOK_AHEAD
from tests.analysis import synthetic
from tests.analysis.measured import K, representation_rows, run_with, transfer_rows

INTERVALS = TimestepIntervals.uniform(synthetic.T, K)
SAME = np.equal.outer(np.arange(K) < K // 2, np.arange(K) < K // 2)
OFF = ~np.eye(K, dtype=bool)


@pytest.fixture(scope="module")
def problem():
    """Losses, a network in the middle between both groups, and a way to draw batches."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(3, 6, generator=generator)
    model = nn.Linear(6, 3, bias=False)
    nn.init.zeros_(model.weight)

    def sample_losses(batch, backbone):
        return SimpleNamespace(loss=(backbone(batch.x0) - batch.noise).square().sum(1))

    def draw(count: int = 20 * K) -> NoisedBatch:
        t = torch.arange(count) * synthetic.T // count
        sign = torch.where(INTERVALS.task_of(t) < K // 2, 1.0, -1.0)[:, None]
        x = torch.randn(count, 6, generator=generator)
        return NoisedBatch(x, None, t, sign * x @ wanted.T + 0.5 * torch.randn(count, 3, generator=generator))

    return SimpleNamespace(sample_losses=sample_losses, intervals=INTERVALS), model, draw


def of_task(batch: NoisedBatch, task: int) -> NoisedBatch:
    chosen = INTERVALS.task_of(batch.t) == task
    return NoisedBatch(batch.x0[chosen], None, batch.t[chosen], batch.noise[chosen])


def rows_of(found: list[Transfer], measure: str, repeat: int) -> dict:
    """As `dtr-lab affinity` writes them."""
    before, change = (np.stack([getattr(each, name).numpy() for each in found]) for name in ("before", "change"))
    rows = transfer_rows(np.zeros((K, K)), measure=measure, updates=found[0].updates, repeat=repeat)
    return rows | {
        "count": np.stack([each.count.numpy() for each in found]).tolist(),
        "before": list(before),
        "change": list(change),
        "change_sq": [each.change_sq.numpy() for each in found],
    }


def assert_two_groups(affinity, between: float) -> None:
    values = affinity.values
    assert values[SAME & OFF].min() > max(0.2, between)
    assert values[~SAME].max() < between
    found = cluster_intervals(affinity_units(affinity), 2)
    assert found.bounds == (0, synthetic.T // 2, synthetic.T)


def test_look_ahead_finds_them(problem, tmp_path):
    module, model, draw = problem
    meter = TransferMeter(module, model, lambda m: torch.optim.SGD(m.parameters(), lr=0.02))
    rows = [rows_of(meter.look_ahead(draw(), draw()), LOOK_AHEAD, repeat) for repeat in range(4)]
    assert_two_groups(look_ahead_affinity(run_with(tmp_path, transfers=rows), relative=True), 0.0)


def test_fine_tuning_finds_them(problem, tmp_path):
    module, model, draw = problem
    meter = TransferMeter(module, model, lambda m: torch.optim.AdamW(m.parameters(), lr=0.05))
    rows = []
    for repeat in range(4):
        batches, evaluated = {number: draw() for number in range(1, 21)}, [draw()]
        last = []
        for task in range(K):
            alone = {number: of_task(batch, task) for number, batch in batches.items()}
            last += meter.fine_tune(task, alone.__getitem__, evaluated, [20])
        rows.append(rows_of(last, FINE_TUNING, repeat))
    assert_two_groups(fine_tuning_affinity(run_with(tmp_path, transfers=rows), relative=True), 0.0)


def test_representations_find_them(tmp_path):
    generator = torch.Generator().manual_seed(1)
    times = [25 * task + at for task in range(K) for at in (5, 15)]
    groups = torch.randn(2, 64, 10, generator=generator, dtype=torch.float64)
    batches = []
    for batch in range(3):
        x = torch.stack([groups[int(t >= synthetic.T // 2)] for t in times])
        x = x + 0.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        hsic = unbiased_hsic(x @ x.transpose(1, 2)).numpy()
        batches.append(representation_rows(dict.fromkeys(synthetic.CHANNELS, hsic), times, batch=batch))
    assert_two_groups(representation_affinity(run_with(tmp_path, representations=batches)), 0.3)
