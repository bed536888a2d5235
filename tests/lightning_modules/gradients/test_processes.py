"""Two processes with half of the batch each (gloo, DistributedDataParallel) against one with all of it."""

import os
import subprocess
import sys

import pytest
import torch

from tests.lightning_modules.gradients.workers import GROUPS, HALVES, network, squares, tokens, weights
from tests.oracles.group_gradients import Truth, errors, gradient_error, truth


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What each of the two processes measured."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.lightning_modules.gradients.workers"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in (0, 1)
    ]
    for process in running:
        _, problems = process.communicate(timeout=120)
        assert process.returncode == 0, problems
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def expected(part=slice(None), reduction="mean") -> Truth:
    model, x, weight = network(), tokens()[part], weights()[part]
    return truth(model, lambda: squares(model(x)) * weight, torch.cat(HALVES)[part], GROUPS, reduction)


def assert_agrees(result, target: Truth, counts):
    layers, values, own_counts, coverage, grad = result
    from lightning_modules.gradients import Gramian

    assert coverage == 1.0
    assert own_counts.tolist() == counts
    assert max(errors(Gramian(layers, values, own_counts), target).values()) < 1e-10
    return grad


@pytest.mark.parametrize("way", ["global mean", "global sum", "retained"])
def test_the_global_gramian_is_that_of_one_process_with_the_whole_batch(measured, way):
    reduction = "sum" if way == "global sum" else "mean"
    target = expected(reduction=reduction)
    if reduction == "sum":  # DistributedDataParallel averages what the processes have summed
        target = Truth(target.layers, {name: grad / 2 for name, grad in target.grad.items()})
    for results in measured:
        grad = assert_agrees(results[way], target, [3, 3, 1, 0, 1])
        assert gradient_error(grad, target) < 1e-10
    torch.testing.assert_close(measured[0][way][1], measured[1][way][1], rtol=0, atol=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_local_gramian_is_that_of_the_process_alone(measured, rank):
    part = slice(4 * rank, 4 * rank + 4)
    grad = assert_agrees(measured[rank]["local"], expected(part), torch.bincount(HALVES[rank], minlength=5).tolist())
    assert gradient_error(grad, expected()) < 1e-10  # gradients are averaged all the same
