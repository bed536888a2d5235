"""What an update does to tasks whose gradients are known: shares, the rest, first-order TAG, condition numbers."""

import numpy as np
import pytest
import xarray as xr

from analysis import affinity, gramians, update
from analysis.jackknife import half_width
from analysis.moments import diagonal, task_gramian
from tests.analysis.simulation import GRAM, NORMS, TRACES, WIDTH, K, covered, simulated, true_gradients

WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4])
SUM = WEIGHTS @ true_gradients()
ALONG = true_gradients() @ SUM


def weights():
    return xr.DataArray(WEIGHTS, dims="task")


@pytest.fixture(scope="module")
def many():
    data = simulated(200, 150)
    return data.gramian, data.group_count


def mean_products(many):
    """(copies, K, K) of the noisy task gradients."""
    return task_gramian(*many).mean("gradient_step").transpose("layer", "task", "other_task").values


def test_cosine_with_the_update(many):
    truth = ALONG / (NORMS * np.linalg.norm(SUM))
    found = update.update_cosine(*many, weights=weights())
    assert 0.90 < covered(found, "cosine", truth, half_width(found)) < 0.99
    products = mean_products(many)
    along = products @ WEIGHTS
    naive = along / np.sqrt(np.einsum("lkk->lk", products) * (along @ WEIGHTS)[:, None])
    assert np.abs(naive.mean(0) - truth).max() > 5 * np.abs(found.cosine.mean("layer") - truth).max()


def test_shares_of_the_update_are_right_and_sum_to_one(many):
    truth = WEIGHTS * ALONG / (SUM @ SUM)
    found = update.update_share(*many, weights=weights())
    np.testing.assert_allclose(found.share.sum("task"), 1.0, rtol=1e-9)
    assert 0.90 < covered(found, "share", truth, half_width(found)) < 0.99
    along = mean_products(many) @ WEIGHTS
    naive = WEIGHTS * along / (along @ WEIGHTS)[:, None]
    assert np.abs(naive.mean(0) - truth).max() > 0.05  # noise gives every task a share
    assert np.abs(found.share.mean("layer") - truth).max() < 0.01
    assert truth.min() < 0.05


def test_equal_weights_are_the_default(many):
    equal = xr.DataArray(np.full(K, 2.0), dims="task")  # their size cancels
    for measure in (update.update_cosine, update.update_share, update.rest_cosine):
        xr.testing.assert_allclose(measure(*many), measure(*many, weights=equal))


def test_cosine_of_a_task_with_the_rest(many):
    gradients = true_gradients()
    rest = SUM - WEIGHTS[:, None] * gradients
    truth = (gradients * rest).sum(-1) / (NORMS * np.linalg.norm(rest, axis=1))
    found = update.rest_cosine(*many, weights=weights())
    assert 0.90 < covered(found, "cosine", truth, half_width(found)) < 0.99
    raw = update.rest_cosine(*many, weights=weights(), corrected=False)
    assert np.abs(raw.cosine.mean("layer") - truth).max() > 5 * np.abs(found.cosine.mean("layer") - truth).max()
    clear = np.abs(truth) > 0.2
    assert (np.abs(raw.cosine.mean("layer")) < 0.75 * np.abs(truth)).values[clear].all()
    assert covered(raw, "cosine", truth, half_width(raw)) < 0.6


def test_raw_cosine_with_the_rest_against_vectors():
    """From one half per task; written out with the gradients themselves."""
    gradients = np.random.default_rng(0).standard_normal((1, K, WIDTH))
    dims = ("gradient_step", "task", "half", "other_task", "other_half")
    products = np.einsum("skp,slp->skl", gradients, gradients)[:, :, None, :, None]
    gramian = xr.DataArray(products, dims=dims)
    count = xr.DataArray(np.full((1, K, 1), 5), dims=dims[:3])
    found = update.rest_cosine(gramian, count, weights=weights(), corrected=False)
    own = gradients[0]
    for task in range(K):
        rest = sum(WEIGHTS[other] * own[other] for other in range(K) if other != task)
        expected = own[task] @ rest / (np.linalg.norm(own[task]) * np.linalg.norm(rest))
        assert float(found.cosine[task]) == pytest.approx(expected)


def test_nothing_is_said_of_an_update_within_noise():
    data = simulated(40, 60, means=np.zeros((K, WIDTH)))
    for measure, name in (
        (update.update_cosine, "cosine"),
        (update.update_share, "share"),
        (update.rest_cosine, "cosine"),
        (update.condition_number, "condition_number"),
    ):
        found = measure(data.gramian, data.group_count)
        assert float(found[name].isnull().mean()) > 0.93
        assert found[name].isnull().equals(found.standard_error.isnull())


def losses(data, values):
    """Losses of the groups, those of the tasks with noise that averages out."""
    noise = 1 + 0.1 * np.random.default_rng(5).standard_normal(data.group_count.shape)
    return data.group_count.copy(data=np.asarray(values)[:, None] * noise)


def test_tag_affinity_is_the_lookahead_for_small_steps():
    """Quadratic losses L_k = |θ - c_k|² / 2 + b_k, whose gradients θ - c_k are known everywhere, and the step taken."""
    gradients, offset, rate = true_gradients(), np.array([0.5, 1.0, 1.5, 2.0]), 1e-3
    loss = (gradients**2).sum(-1) / 2 + offset  # at θ = 0 with c_k = -g_k
    after = ((gradients[None] - rate * gradients[:, None]) ** 2).sum(-1) / 2 + offset
    lookahead = 1 - after / loss
    data = simulated(200, 150)
    found = update.first_order_tag(data.gramian, data.group_count, losses(data, loss), rate)
    assert 0.90 < covered(found, "affinity", rate * GRAM / loss, half_width(found)) < 0.99
    np.testing.assert_allclose(found.affinity.mean("layer"), lookahead, atol=4e-5)
    assert np.abs(lookahead).max() > 1e-3
    naive = rate * diagonal(task_gramian(data.gramian, data.group_count)).mean(("gradient_step", "layer")) / loss
    assert (naive > 1.5 * np.diag(lookahead)).all()


def test_learning_rate_may_change_from_probe_to_probe():
    data = simulated(10, 2)
    rate = xr.DataArray(np.linspace(0.1, 1.0, 10), dims="gradient_step")
    loss = losses(data, np.ones(K))
    found = update.first_order_tag(data.gramian, data.group_count, loss, rate).affinity
    products = task_gramian(data.gramian, data.group_count)
    samples = data.group_count.sum("half")
    mean_loss = ((loss * data.group_count).sum("half") / samples).mean("gradient_step")
    expected = float((rate * products[:, 0, 1, 2]).mean()) / float(mean_loss[2])
    assert float(found.sel(task=1, other_task=2)[0]) == pytest.approx(expected)


def test_tag_affinity_of_a_run_adds_up_over_blocks(runs):
    total = affinity.tag_affinity(runs[0], 0.01)
    assert total.dims == ("task", "other_task")
    by_block = affinity.tag_affinity(runs[0], 0.01, level="block")
    assert by_block.block.values.tolist() == ["x_embedder", "blocks.0", "blocks.1", "final_layer"]
    np.testing.assert_allclose(by_block.sum("block"), total, rtol=1e-5, atol=1e-9)
    assert not np.allclose(total, total.values.T)


def test_condition_number_of_the_true_gradients():
    gram = np.diag([1.0, 2.0, 3.0, 4.0])
    gram[0, 3] = gram[3, 0] = 0.8
    truth = np.linalg.cond(true_gradients(gram)[:, :K])
    data = simulated(600, 100, means=true_gradients(gram), traces=TRACES / 2)
    found = update.condition_number(data.gramian, data.group_count)
    assert 0.88 < covered(found, "condition_number", truth, half_width(found)) < 0.99
    naive = np.sqrt(np.linalg.cond(mean_products((data.gramian, data.group_count))))
    assert np.abs(naive - truth).min() > 0.25
    assert float(np.abs(found.condition_number.mean() - truth)) < 0.08


def test_weights_of_the_training_loss_are_the_shares_of_timesteps():
    tasks = gramians.task_coordinates([0, 10, 40, 100])
    np.testing.assert_allclose(update.loss_weights(tasks), [0.1, 0.3, 0.6])
