"""Look-ahead and fine-tuning against closed forms on a quadratic, and against doing it by hand on a DiT."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_modules.denoiser import NoisedBatch
from lightning_modules.task_transfer import TransferMeter
from lightning_modules.timesteps import TimestepIntervals

T, K, RATE = 40, 4, 0.05
INTERVALS = TimestepIntervals.uniform(T, K)


def quadratic(seed: int = 0, count: int = 24) -> tuple[SimpleNamespace, nn.Module, list[NoisedBatch]]:
    """Loss of a sample |W x - y|^2 / 2: quadratic in W, so that a look-ahead is its Taylor expansion to order two."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    model = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(draw(3, 5))

    def sample_losses(batch, backbone):
        return SimpleNamespace(loss=(backbone(batch.x0) - batch.noise).square().sum(1) / 2)

    t = torch.arange(count) * T // count
    batches = [NoisedBatch(draw(count, 5), None, t, draw(count, 3)) for _ in range(3)]
    return SimpleNamespace(sample_losses=sample_losses, intervals=INTERVALS), model, batches


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=RATE)


def task_gradients(model, batch):
    """(K, 3, 5) of the mean losses, and the per-sample residuals (B, 3)."""
    residual = batch.x0 @ model.weight.detach().T - batch.noise
    task = INTERVALS.task_of(batch.t)
    return torch.stack([residual[task == k].T @ batch.x0[task == k] / (task == k).sum() for k in range(K)])


def test_a_look_ahead_on_a_quadratic_is_its_expansion_to_second_order():
    module, model, (update, evaluation, _) = quadratic()
    found = TransferMeter(module, model, sgd).look_ahead(update, evaluation)
    step, ahead = task_gradients(model, update), task_gradients(model, evaluation)
    task = INTERVALS.task_of(evaluation.t)
    for source, transfer in enumerate(found):
        moved = evaluation.x0 @ step[source].T  # how the step turns each sample's output, per unit of rate
        curvature = torch.stack([moved[task == k].square().sum(1).mean() / 2 for k in range(K)])
        first = -RATE * torch.einsum("ij,kij->k", step[source], ahead)
        torch.testing.assert_close(transfer.predicted, first)
        torch.testing.assert_close(transfer.change / transfer.count, first + RATE**2 * curvature)
        assert transfer.source == source
        assert transfer.updates == 1


def test_the_prediction_becomes_exact_as_the_step_shrinks():
    module, model, (update, evaluation, _) = quadratic()
    errors = []
    for rate in (1e-2, 1e-3):
        meter = TransferMeter(module, model, lambda m, rate=rate: torch.optim.SGD(m.parameters(), lr=rate))
        found = meter.look_ahead(update, evaluation)
        errors.append(max(float((f.change / f.count - f.predicted).abs().max() / rate) for f in found))
    assert errors[1] == pytest.approx(errors[0] / 10, rel=1e-6)


def test_sums_over_samples_are_of_each_task():
    module, model, (update, evaluation, _) = quadratic()
    before = module.sample_losses(evaluation, model).loss.detach()
    task = INTERVALS.task_of(evaluation.t)
    found = TransferMeter(module, model, sgd).look_ahead(update, evaluation)[2]
    chosen = INTERVALS.task_of(update.t) == 2
    moved = copy.deepcopy(model)
    part = NoisedBatch(update.x0[chosen], None, update.t[chosen], update.noise[chosen])
    module.sample_losses(part, moved).loss.mean().backward()
    with torch.no_grad():
        moved.weight -= RATE * moved.weight.grad
    change = module.sample_losses(evaluation, moved).loss.detach() - before
    for k in range(K):
        assert float(found.before[k]) == pytest.approx(float(before[task == k].sum()))
        assert float(found.change[k]) == pytest.approx(float(change[task == k].sum()))
        assert float(found.change_sq[k]) == pytest.approx(float(change[task == k].square().sum()))
    assert found.count.tolist() == torch.bincount(task).tolist()


def test_fine_tuning_is_a_training_on_that_task_alone():
    module, model, (first, second, evaluation) = quadratic()
    draws = {1: first, 2: second, 3: first}
    meter = TransferMeter(module, model, lambda m: torch.optim.AdamW(m.parameters(), lr=RATE))
    found = list(meter.fine_tune(1, draws.__getitem__, [evaluation], [1, 3]))
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=RATE)
    before = module.sample_losses(evaluation, by_hand).loss.detach()
    changes = {}
    for number in (1, 2, 3):
        optimizer.zero_grad()
        module.sample_losses(draws[number], by_hand).loss.mean().backward()
        optimizer.step()
        changes[number] = module.sample_losses(evaluation, by_hand).loss.detach() - before
    assert [each.updates for each in found] == [1, 3]
    for each in found:
        assert float(each.change.sum()) == pytest.approx(float(changes[each.updates].sum()))
        assert torch.isnan(each.predicted).all()


def test_the_network_and_the_optimizer_are_left_as_they_were():
    module, model, (update, evaluation, _) = quadratic()
    before = model.weight.detach().clone()
    meter = TransferMeter(module, model, lambda m: torch.optim.AdamW(m.parameters(), lr=RATE))
    first = meter.look_ahead(update, evaluation)
    assert torch.equal(model.weight, before)
    tuned = meter.fine_tune(0, lambda _: update, [evaluation], [5])
    next(tuned)
    tuned.close()  # given up half-way
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None
    again = meter.look_ahead(update, evaluation)
    assert all(torch.equal(a.change, b.change) for a, b in zip(first, again, strict=True)), "Adam's moments went on"


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda m: torch.optim.AdamW(m.parameters(), lr=RATE),
        lambda m: torch.optim.SGD(m.parameters(), lr=RATE, momentum=0.9),
        lambda m: torch.optim.SGD(m.parameters(), lr=RATE, weight_decay=0.1),
    ],
)
def test_only_plain_gradient_descent_has_a_first_order_form(optimizer):
    module, model, (update, evaluation, _) = quadratic()
    found = TransferMeter(module, model, optimizer).look_ahead(update, evaluation)
    assert all(torch.isnan(each.predicted).all() for each in found)


@pytest.mark.parametrize("method", ["baseline", "dtr"])
def test_a_real_denoiser_is_predicted_by_its_gramian(make_denoiser, batch, method):
    module = make_denoiser(method).double().eval()
    generator = torch.Generator().manual_seed(0)
    images, labels = batch[0].double(), batch[1]
    drawn = [
        NoisedBatch(
            images,
            labels,
            module.intervals.sample_stratified(16, generator),
            torch.randn(images.shape, generator=generator, dtype=torch.float64),
        )
        for _ in range(2)
    ]
    meter = TransferMeter(module, module.backbone, lambda m: torch.optim.SGD(_trained(m), lr=1e-7))
    for transfer in meter.look_ahead(*drawn):
        torch.testing.assert_close(transfer.change / transfer.count, transfer.predicted, rtol=1e-4, atol=1e-16)


def _trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
