"""Tests for `analysis/timestep_affinity.py`: simulations in which the truth is known."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis.plots.timesteps import plot_timestep_affinity
from analysis.report.timestep_figures import timestep_affinity_figure
from analysis.timestep_affinity import timestep_affinity

TIMESTEPS, SIZE = 60, 3000


def true_gradients(rng, timesteps=TIMESTEPS, size=SIZE):
    """Unit gradients that turn slowly from one direction to another: cosines between 1 and about -0.4."""
    start, end = np.linalg.qr(rng.standard_normal((size, 2)))[0].T
    angle = np.linspace(0, 2.0, timesteps)
    return np.cos(angle)[:, None] * start + np.sin(angle)[:, None] * end


def halves(rng, truth, noise):
    """Both halves: the truth and independent noise, whose norm is that many times the gradient's."""
    return truth + noise / np.sqrt(truth.shape[1]) * rng.standard_normal((2, *truth.shape))


def project(sketches, width, rng):
    """Dense Gaussian projection: independent of the sketch under test, with the same law of error."""
    return sketches @ rng.standard_normal((sketches.shape[-1], width)) / np.sqrt(width)


def analyse(sketches):
    count = sketches.shape[1]
    return timestep_affinity(sketches, np.arange(count) * 3, -np.linspace(-9, 9, count))


def root_mean_square(values):
    off = ~np.eye(len(values), dtype=bool)
    return float(np.sqrt(np.nanmean(np.asarray(values)[off] ** 2)))


@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_the_corrected_cosine_finds_the_truth_and_states_its_error(noise):
    errors, stated, plain_bias = [], [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        truth = true_gradients(rng)
        found = analyse(halves(rng, truth, noise))
        exact = truth @ truth.T
        errors.append(found["cosine"].values - exact)
        stated.append(found.attrs["sampling_error"])
        large = np.abs(exact) > 0.5
        plain_bias.append(np.nanmean((found["plain_cosine"].values / exact)[large & ~np.eye(TIMESTEPS, dtype=bool)]))
        assert np.isfinite(found["cosine"]).mean() > 0.9
    errors = np.array(errors)
    actual = np.sqrt(np.mean([root_mean_square(error) ** 2 for error in errors]))
    assert np.sqrt(np.mean(np.square(stated))) == pytest.approx(actual, rel=0.25)
    # Unbiased: the mean over repetitions errs by no more than its own standard error allows.
    assert abs(np.nanmean(errors)) < 4 * actual / np.sqrt(len(errors))
    # The plain cosine is drawn to zero by the factor that theory says.
    assert np.mean(plain_bias) == pytest.approx(1 / (1 + noise**2 / 2), rel=0.1)


def test_noise_alone_is_undefined_and_never_zero():
    rng = np.random.default_rng(0)
    truth = true_gradients(rng)
    truth[20:] = 0.0
    found = analyse(halves(rng, truth, 1.0))
    signal = found["signal"].values
    assert (signal[:20] > 10).all()
    assert np.std(signal[20:]) == pytest.approx(1.0, rel=0.4)  # in units of what noise does
    shown = np.isfinite(found["cosine"].values)
    assert shown[:20, :20].all()
    assert shown[20:, 20:].mean() < 0.02
    assert np.isnan(found["cosine"].values[~shown]).all()


def test_noise_of_few_dimensions_does_not_pass_for_signal():
    # As the gradients of a network that is nearly trained: large noise along a few directions that turn with t.
    passed = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        directions = rng.standard_normal((5, SIZE))
        turned = (
            directions * np.cos(np.linspace(0, 1.5, TIMESTEPS))[:, None, None]
            + rng.standard_normal((5, SIZE)) * np.sin(np.linspace(0, 1.5, TIMESTEPS))[:, None, None]
        )
        noise = np.einsum("htr,trs->hts", rng.standard_normal((2, TIMESTEPS, 5)), turned)
        found = analyse(noise + 0.1 * rng.standard_normal((2, TIMESTEPS, SIZE)))
        passed.append(float((found["signal"] > 3).mean()))
    assert np.mean(passed) < 0.02


@pytest.mark.parametrize(("width", "noise"), [(256, 0.5), (1024, 1.5)])
def test_the_sketch_states_its_own_error(width, noise):
    actual, stated = [], []
    for seed in range(16):
        rng = np.random.default_rng(seed)
        exact = halves(rng, true_gradients(rng, size=800), noise)
        sketched = analyse(project(exact, width, rng))
        actual.append(root_mean_square(sketched["cosine"].values - analyse(exact)["cosine"].values))
        stated.append(sketched.attrs["sketch_error"])
    assert np.sqrt(np.mean(np.square(stated))) == pytest.approx(np.sqrt(np.mean(np.square(actual))), rel=0.2)


def test_timesteps_without_measurements_are_undefined():
    rng = np.random.default_rng(0)
    sketches = halves(rng, true_gradients(rng), 0.5)
    whole = analyse(np.delete(sketches, 7, axis=1))
    sketches[1, 7] = np.nan
    found = analyse(sketches)
    for name in ("cosine", "plain_cosine"):
        assert np.isnan(found[name].values[7]).all()
        kept = np.delete(np.delete(found[name].values, 7, 0), 7, 1)
        np.testing.assert_allclose(kept, whole[name].values)
    assert np.isnan(found["signal"][7])
    np.testing.assert_allclose(np.delete(found["sampling_error"], 7), whole["sampling_error"])
    assert found.attrs["sampling_error"] == pytest.approx(whole.attrs["sampling_error"])


def test_the_matrix_is_symmetric_with_ones_on_its_diagonal():
    rng = np.random.default_rng(0)
    found = analyse(halves(rng, true_gradients(rng), 0.5))
    np.testing.assert_array_equal(found["cosine"], found["cosine"].T)
    np.testing.assert_array_equal(np.diagonal(found["cosine"]), 1.0)


@pytest.mark.parametrize("shape", [(2, 1, 5), (3, 4, 5), (4, 5)])
def test_what_has_no_two_halves_is_refused(shape):
    with pytest.raises(ValueError, match="sketches must be"):
        timestep_affinity(np.ones(shape), np.arange(shape[1]), np.arange(shape[1]))


def test_the_figure_names_timesteps_and_log_snr():
    rng = np.random.default_rng(0)
    found = analyse(halves(rng, true_gradients(rng), 0.5))
    figure = timestep_affinity_figure(found)
    assert figure.png.startswith(b"\x89PNG")
    assert f"{found.attrs['sketch_error']:.3f}" in figure.caption
    ax = plot_timestep_affinity(found["cosine"], ax=Figure().subplots())
    assert [label.get_text() for label in ax.get_xticklabels()][::8] == ["0", str(3 * (TIMESTEPS - 1))]
    top = ax.child_axes[0]
    assert [label.get_text() for label in top.get_xticklabels()][::8] == ["9.0", "-9.0"]
