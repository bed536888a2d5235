"""Tests for `lightning_modules/gradients/gramian.py`."""

import torch
from torch import nn

from lightning_modules.denoiser import NoisedBatch
from lightning_modules.gradients import gramian_by_subbatches, split_tasks


def oracle(losses, parameters, group, num_groups):
    """All groups' gradients from retained backward passes over the whole batch's loss vector."""
    rows = []
    for g in range(num_groups):
        members = losses[group == g]
        if len(members) == 0:
            rows.append(torch.zeros(sum(p.numel() for p in parameters), dtype=losses.dtype))
            continue
        parts = torch.autograd.grad(members.mean(), parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(p * 0 if d is None else d).flatten() for p, d in zip(parameters, parts, strict=True)]))
    matrix = torch.stack(rows)
    return matrix @ matrix.T


def test_the_gramian_equals_retained_backward_passes(make_denoiser, batch):
    for method in ("baseline", "dtr"):
        module = make_denoiser(method).double()
        drawn = module.draw((batch[0].double(), batch[1]), 0)
        group = split_tasks(module.intervals.task_of(drawn.t), 4, 2)
        group[group == 3] = 2  # one empty group, and unequal sizes
        parameters = {name: p for name, p in module.backbone.named_parameters() if p.requires_grad}

        def sample_loss(rows, module=module, drawn=drawn):
            return module.sample_losses(NoisedBatch(*(field[rows] for field in drawn))).loss

        result = gramian_by_subbatches(sample_loss, parameters, group, 8)
        losses = module.sample_losses(drawn).loss
        expected = oracle(losses, list(parameters.values()), group, 8)
        total = result.values.sum(0)
        assert (total - expected).abs().max() / expected.abs().max() < 1e-12
        assert (result.values[:, 3] == 0).all()
        assert result.counts.tolist() == [2, 2, 4, 0, 2, 2, 2, 2]
        for index, layer in enumerate(result.layers):
            own = [p for name, p in parameters.items() if name.rpartition(".")[0] == layer]
            expected = oracle(losses, own, group, 8)
            assert (result.values[index] - expected).abs().max() <= 1e-12 * expected.abs().max(), layer
        assert all(p.grad is None for p in parameters.values())


def test_the_loss_scale_cancels():
    model = nn.Linear(3, 1).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    group = torch.arange(8) % 2
    plain, scaled = (
        gramian_by_subbatches(
            lambda rows: model(x[rows]).square().squeeze(1), dict(model.named_parameters()), group, 2, s
        )
        for s in (1.0, 1024.0)
    )
    torch.testing.assert_close(plain.values, scaled.values)
