"""What each gradient method promises, on problems small enough to see it; see its paper for the names."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lightning_modules.balancing.config import GRADIENT_METHODS, BalancingConfig
from lightning_modules.balancing.gramian_weights import GramianWeights
from lightning_modules.errors import UserInputError

CONFLICT = torch.tensor([[1.0, 0.2, 0.0, 0.5], [-2.0, 1.5, 0.3, 0.0], [0.3, -0.4, 1.0, -0.1]], dtype=torch.float64)
"""Gradients of three tasks (K, P): the second is the largest and conflicts with the first and the third."""
AGREEMENT = torch.tensor([[1.0, 0.2, 0.0, 0.5], [2.0, 1.5, 0.3, 0.0], [0.3, 0.4, 1.0, 0.1]], dtype=torch.float64)


def combined(method: str, jacobian: torch.Tensor, *entropy: int, **settings) -> torch.Tensor:
    """The method's gradient (P,)."""
    weighting = GramianWeights(BalancingConfig(method=method, **settings), len(jacobian))
    return weighting(jacobian @ jacobian.T, *entropy) @ jacobian


def gains(direction: torch.Tensor, jacobian: torch.Tensor) -> torch.Tensor:
    """First-order decrease of each task's loss (K,) for a small step against ``direction``."""
    return jacobian @ direction


def test_the_problem_is_one_where_the_plain_step_harms():
    assert (gains(CONFLICT.mean(0), CONFLICT) < 0).any()
    assert (CONFLICT @ CONFLICT.T < 0).any()
    assert (AGREEMENT @ AGREEMENT.T > 0).all()


@pytest.mark.parametrize("method", ["upgrad", "mgda", "config", "nash_mtl", "imtl_g", "aligned_mtl"])
def test_no_task_is_harmed_in_a_conflict(method):
    assert (gains(combined(method, CONFLICT), CONFLICT) > -1e-9).all()


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_conflict_ends_better_for_the_worst_task_than_plainly(method):
    plain, balanced = CONFLICT.mean(0), combined(method, CONFLICT, 3)
    worst = (gains(d / d.norm(), CONFLICT).min() for d in (balanced, plain))
    assert next(worst) > next(worst)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_under_agreement_no_task_is_harmed(method):
    assert (gains(combined(method, AGREEMENT), AGREEMENT) > 0).all()


@pytest.mark.parametrize("method", ["pcgrad", "upgrad", "gradvac"])
def test_under_agreement_surgery_is_plain_training(method):
    torch.testing.assert_close(combined(method, AGREEMENT), AGREEMENT.mean(0))


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_equal_gradients_stay_what_they_are(method):
    jacobian = AGREEMENT[:1].repeat(4, 1)
    direction = combined(method, jacobian)
    cosine = torch.cosine_similarity(direction, jacobian[0], dim=0)
    assert cosine.item() == pytest.approx(1)


def test_pcgrad_projects_two_conflicting_gradients_onto_each_others_normal_planes():
    first, second = CONFLICT[:2]
    dot = first @ second
    expected = (first - dot / (second @ second) * second) + (second - dot / (first @ first) * first)
    torch.testing.assert_close(combined("pcgrad", CONFLICT[:2]), expected / 2)


def test_pcgrads_order_follows_from_the_entropy_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    draws = torch.stack([combined("pcgrad", CONFLICT, seed) for seed in range(20)])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(draws[7], combined("pcgrad", CONFLICT, 7))
    assert (draws != draws[0]).any()


def test_mgda_finds_the_point_of_least_norm_in_the_convex_hull():
    gramian = (CONFLICT @ CONFLICT.T).numpy()
    found = minimize(
        lambda w: w @ gramian @ w,
        np.ones(3) / 3,
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14},
    )
    direction = combined("mgda", CONFLICT)
    # Frank and Wolfe's steps, as MGDA's code takes them, stop at a thousandth.
    assert (direction @ direction).item() == pytest.approx(found.fun, rel=2e-2)
    assert (gains(direction, CONFLICT) >= 0.95 * direction @ direction).all()


def test_upgrad_is_the_mean_of_projections_onto_the_dual_cone():
    rows = CONFLICT.numpy()
    projected = []
    for row in rows:
        # The projection of g onto {d : J d >= 0} is g + J' v with the v >= 0 that makes it shortest.
        solved = minimize(lambda v, g=row: ((g + v @ rows) ** 2).sum(), np.zeros(3), bounds=[(0, None)] * 3, tol=1e-14)
        projected.append(row + solved.x @ rows)
    np.testing.assert_allclose(combined("upgrad", CONFLICT).numpy(), np.mean(projected, 0), atol=1e-3)


def test_cagrad_maximises_the_worst_gain_in_its_ball():
    mean, c = CONFLICT.mean(0), 0.4
    direction = combined("cagrad", CONFLICT, cagrad_c=c)
    assert (direction - mean).norm().item() == pytest.approx(c * mean.norm().item(), rel=1e-3)
    found = minimize(
        lambda x: -x[-1],
        [*mean.tolist(), 0.0],
        constraints=[
            {"type": "ineq", "fun": lambda x: CONFLICT.numpy() @ x[:-1] - x[-1]},
            {"type": "ineq", "fun": lambda x: (c * mean.norm().item()) ** 2 - ((x[:-1] - mean.numpy()) ** 2).sum()},
        ],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert gains(direction, CONFLICT).min().item() == pytest.approx(-found.fun, rel=1e-3)
    torch.testing.assert_close(combined("cagrad", CONFLICT, cagrad_c=0.0), mean)


def test_imtl_g_has_equal_projections_on_all_gradients():
    units = CONFLICT / CONFLICT.norm(dim=1, keepdim=True)
    projections = gains(combined("imtl_g", CONFLICT), units)
    torch.testing.assert_close(projections, projections[:1].expand(3))


def test_config_has_equal_cosines_and_the_length_of_all_projections():
    direction = combined("config", CONFLICT)
    unit = direction / direction.norm()
    cosines = gains(unit, CONFLICT / CONFLICT.norm(dim=1, keepdim=True))
    torch.testing.assert_close(cosines, cosines[:1].expand(3))
    assert (3 * direction.norm()).item() == pytest.approx(gains(unit, CONFLICT).sum().item())


def test_nash_mtl_is_the_bargaining_solution():
    """G w = 1 / w up to a common factor: all tasks' weighted gains are equal, also of tasks of other scales.

    Not of any scales: beyond lengths of one to some tens, TorchJD's solver stops short of the solution.
    """
    for jacobian in (CONFLICT, CONFLICT * torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64)):
        gramian = jacobian @ jacobian.T
        weights = GramianWeights(BalancingConfig(method="nash_mtl"), 3)(gramian)
        shares = weights * (gramian @ weights)
        assert (weights > 0).all()
        torch.testing.assert_close(shares, shares.mean().expand(3), rtol=1e-3, atol=0)


def test_nash_mtl_bounds_its_gradients_norm():
    long = 100 * CONFLICT
    assert combined("nash_mtl", long, nash_max_norm=0.5).norm().item() == pytest.approx(0.5)


def test_aligned_mtl_makes_the_gradients_orthogonal_and_equally_long():
    """The mean of rows B J with B G B = s^2 I, s the smallest singular value of J."""
    values, vectors = torch.linalg.eigh(CONFLICT @ CONFLICT.T)
    smallest = values.min().sqrt()
    aligned = vectors @ torch.diag(smallest / values.sqrt()) @ vectors.T @ CONFLICT
    torch.testing.assert_close(aligned @ aligned.T, smallest**2 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(combined("aligned_mtl", CONFLICT), aligned.mean(0))


def test_gradvac_raises_cosines_to_what_they_were_before():
    """Two tasks that agreed for some steps: in a conflict each is turned until their cosine is the remembered one."""
    weighting = GramianWeights(BalancingConfig(method="gradvac", gradvac_beta=1.0), 2)
    friends = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    foes = torch.tensor([[1.0, 0.0], [-0.6, 0.8]], dtype=torch.float64)
    weighting(friends @ friends.T)
    direction = weighting(foes @ foes.T) @ foes
    angle = np.arccos(0.6)  # remembered; each is turned towards the other, to that angle from it, and gets no shorter
    first, second = foes
    turned_first = np.array([np.cos(np.pi - angle - angle), np.sin(np.pi - angle - angle)])
    turned_second = np.array([0.6, 0.8])
    assert float(second @ torch.as_tensor(turned_first)) == pytest.approx(0.6)
    expected = (turned_first * _length(first, second, 0.6) + turned_second * _length(second, first, 0.6)) / 2
    np.testing.assert_allclose(direction.numpy(), expected, atol=1e-6)


def _length(gradient: torch.Tensor, other: torch.Tensor, cosine: float) -> float:
    """Length of gradient + w other whose cosine with ``other`` is the given one: its part across stays."""
    across = gradient - (gradient @ other) / (other @ other) * other
    return float(across.norm()) / np.sqrt(1 - cosine**2)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_weights_are_finite_for_dependent_gradients_of_any_size(method, scale):
    jacobian = scale * torch.cat([CONFLICT, CONFLICT[:1] + CONFLICT[1:2], CONFLICT[:1]])
    assert combined(method, jacobian).isfinite().all()


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e5])
def test_the_gradients_size_decides_about_the_steps_size_alone(method, scale):
    """TorchJD's solvers have tolerances of absolute size; small gradients must not end in no step, or the plain one."""
    ordinary, scaled = combined(method, CONFLICT, 3), combined(method, scale * CONFLICT, 3)
    expected = ordinary if method == "nash_mtl" else scale * ordinary  # Nash-MTL's step is of its bound's length
    torch.testing.assert_close(scaled, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_method_goes_on_from_its_state(method):
    config = BalancingConfig(method=method)
    first, second = GramianWeights(config, 3), GramianWeights(config, 3)
    conflict, agreement = CONFLICT @ CONFLICT.T, AGREEMENT @ AGREEMENT.T
    first(conflict, 0)
    second.load_state(first.state())
    assert torch.equal(first(agreement, 1), second(agreement, 1))


def test_missing_packages_are_named(monkeypatch):
    from torchjd import aggregation

    def missing(**_):
        raise ImportError('pip install "torchjd[cagrad]"')

    monkeypatch.setattr(aggregation, "CAGradWeighting", missing)
    with pytest.raises(UserInputError, match=r"cagrad needs packages.*torchjd\[cagrad\]"):
        GramianWeights(BalancingConfig(method="cagrad"), 3)


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"method": "pc_grad"}, "pc_grad"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"gradients": "cheap"}, "gradients"),
        ({"processes": "some"}, "processes"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"cagrad_c": -1.0}, "cagrad_c"),
        ({"gradvac_beta": 2.0}, "gradvac_beta"),
        ({"stch_mu": float("nan")}, "stch_mu"),
    ],
)
def test_bad_settings_are_refused(settings, culprit):
    with pytest.raises(UserInputError, match=culprit):
        BalancingConfig(**settings)
