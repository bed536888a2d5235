import numpy as np
import pytest
from scipy import linalg

from analysis.fidelity import frechet_bias, frechet_distance, kernel_distance, precision_recall


def exact_gaussian(rng, count, mean, scale, axes=None):
    """Samples whose own mean is exactly that, and whose unbiased covariance has these roots along the axes given."""
    drawn = rng.standard_normal((count, len(mean)))
    drawn -= drawn.mean(axis=0)
    white = drawn @ linalg.inv(linalg.cholesky(np.cov(drawn.T)))  # the upper factor of R^T R
    return white * scale @ (np.eye(len(mean)) if axes is None else axes).T + mean


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_frechet_distance_of_gaussians_that_commute_has_a_closed_form(rng):
    """|m1 - m2|^2 + sum (sqrt(l1) - sqrt(l2))^2."""
    one, other = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.0])
    turn = linalg.qr(rng.standard_normal((3, 3)))[0]
    first = exact_gaussian(rng, 50, np.array([1.0, 2.0, 3.0]), np.sqrt(one), turn)
    second = exact_gaussian(rng, 80, np.array([1.0, 0.0, 4.0]), np.sqrt(other), turn)
    expected = 5.0 + ((np.sqrt(one) - np.sqrt(other)) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_equals_the_formula_with_a_matrix_square_root(rng):
    first = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5)) + 1
    second = rng.standard_normal((60, 5)) @ rng.standard_normal((5, 5))
    one, other = np.cov(first.T), np.cov(second.T)
    difference = first.mean(0) - second.mean(0)
    expected = difference @ difference + np.trace(one + other - 2 * linalg.sqrtm(one @ other).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero_also_where_its_covariance_is_singular(rng):
    features = rng.standard_normal((6, 10))
    features[:, 3] = 7.0
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(features, features + 2.0) == pytest.approx(40.0)


@pytest.mark.parametrize(("count", "real_count"), [(50, 50), (100, 300)])
def test_frechet_bias_is_what_perfect_samples_give(rng, count, real_count):
    scale = np.sqrt([3.0, 1.0, 0.5, 0.0])
    distances = [
        frechet_distance(rng.standard_normal((count, 4)) * scale, rng.standard_normal((real_count, 4)) * scale)
        for _ in range(1500)
    ]
    reference = exact_gaussian(rng, 200, np.zeros(4), scale)
    error = np.std(distances) / np.sqrt(len(distances))
    assert frechet_bias(reference, count, real_count) == pytest.approx(np.mean(distances), abs=3 * error + 0.003)
    assert frechet_bias(reference, 100) == frechet_bias(reference, 100, 200)


def test_kernel_distance_equals_the_sums_over_all_pairs(rng):
    first, second = rng.standard_normal((7, 4)), rng.standard_normal((9, 4)) + 0.3

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    within = [
        np.mean([kernel(x, y) for i, x in enumerate(own) for j, y in enumerate(own) if i != j])
        for own in (first, second)
    ]
    across = np.mean([kernel(x, y) for x in first for y in second])
    assert kernel_distance(first, second) == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_kernel_distance_is_unbiased(rng):
    drawn = [kernel_distance(rng.standard_normal((20, 3)), rng.standard_normal((30, 3))) for _ in range(2000)]
    assert abs(np.mean(drawn)) < 3 * np.std(drawn) / np.sqrt(len(drawn))
    assert min(drawn) < 0
    shifted = kernel_distance(rng.standard_normal((400, 3)), rng.standard_normal((400, 3)) + 1.0)
    assert shifted > 5 * np.std(drawn)


def test_precision_and_recall_equal_the_definition(rng):
    samples, real, k = rng.standard_normal((25, 2)), 1.5 * rng.standard_normal((35, 2)) + 0.5, 3

    def share(points, manifold):
        inside = 0
        for point in points:
            for member in manifold:
                radius = np.sort(np.linalg.norm(manifold - member, axis=1))[k]
                inside += (hit := np.linalg.norm(point - member) <= radius)
                if hit:
                    break
        return inside / len(points)

    assert precision_recall(samples, real, k) == pytest.approx((share(samples, real), share(real, samples)))


def test_samples_of_one_mode_are_precise_and_miss_the_other(rng):
    modes = np.array([[0.0, 0.0], [20.0, 0.0]])
    real = rng.standard_normal((400, 2)) + np.repeat(modes, 200, axis=0)
    precision, recall = precision_recall(0.5 * rng.standard_normal((400, 2)), real)
    assert precision > 0.95
    assert recall < 0.5
    precision, recall = precision_recall(5 * rng.standard_normal((400, 2)), real)
    assert precision < 0.5
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 100, real) == (0.0, 0.0)


def test_many_rows_give_what_few_at_a_time_give(rng, monkeypatch):
    samples, real = rng.standard_normal((90, 3)), rng.standard_normal((70, 3))
    whole = kernel_distance(samples, real), precision_recall(samples, real)
    monkeypatch.setattr("analysis.fidelity._AT_ONCE", 13)
    assert kernel_distance(samples, real) == pytest.approx(whole[0])
    assert precision_recall(samples, real) == whole[1]


@pytest.mark.parametrize(
    ("samples", "real", "says"),
    [
        (np.zeros((5, 2)), np.zeros((5, 3)), "one D"),
        (np.zeros((5, 2, 1)), np.zeros((5, 2)), "one D"),
        (np.zeros((1, 2)), np.zeros((5, 2)), "rows at least"),
        (np.full((5, 2), np.nan), np.zeros((5, 2)), "NaN"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(samples, real, says):
    for measure in (frechet_distance, kernel_distance, precision_recall):
        with pytest.raises(ValueError, match=says):
            measure(samples, real)


def test_impossible_counts_are_refused(rng):
    with pytest.raises(ValueError, match="neighbours"):
        precision_recall(np.zeros((5, 2)), np.zeros((5, 2)), 0)
    with pytest.raises(ValueError, match="4 rows"):
        precision_recall(np.zeros((3, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="two samples"):
        frechet_bias(rng.standard_normal((10, 2)), 1)
