"""EDM2's uncertainty learns the logarithm of the expected error, and so makes all noise levels' gradients alike."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_modules.noise_schedules import NoiseSchedule
from lightning_modules.uncertainty import LogSnrUncertainty

LOG_SNR = torch.from_numpy(NoiseSchedule.named("linear", 1000).snr).log().float()


def log_error(log_snr: Tensor) -> Tensor:
    """Logarithm of a made-up mean error that runs over three orders of magnitude, as that of epsilon does."""
    return -4.5 + 4.5 * torch.sigmoid((log_snr - 2) / 2)


def trained(seed: int = 0, steps: int = 3000) -> LogSnrUncertainty:
    """Trained as EDM2 trains it, by Adam at 0.01, on errors of known mean: chi-squared with 4 degrees of freedom."""
    module = LogSnrUncertainty(seed=seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / math.sqrt(max(step / 100, 1)))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        log_snr = LOG_SNR[torch.randint(1000, (256,), generator=generator)]
        noise = torch.randn(256, 4, generator=generator).square().mean(1)
        optimizer.zero_grad()
        module.loss(log_error(log_snr).exp() * noise, log_snr).mean().backward()
        optimizer.step()
        schedule.step()
    return module


def test_it_starts_as_the_plain_loss() -> None:
    module = LogSnrUncertainty()
    error = torch.rand(1000)
    assert (module(LOG_SNR) == 0).all()
    assert torch.equal(module.loss(error, LOG_SNR), error)


def test_loss_is_that_of_the_paper() -> None:
    module = LogSnrUncertainty(channels=16)
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(2))
    error, u = torch.rand(1000), module(LOG_SNR)
    torch.testing.assert_close(module.loss(error, LOG_SNR), error / u.exp() + u)


def test_u_is_linear_in_fourier_features_of_unit_magnitude() -> None:
    """EDM2, equation 75, of ln(sigma) / 4, written out for one log-SNR."""
    module = LogSnrUncertainty(channels=5, seed=3)
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(2))
    c_noise = math.log(math.exp(-3.7) ** -0.5) / 4  # sigma = SNR^(-1/2)
    expected = sum(
        w * math.sqrt(2) * math.cos(f * c_noise + p) / math.sqrt(5)
        for w, f, p in zip(module.weight.tolist(), module.frequencies.tolist(), module.phases.tolist(), strict=True)
    )
    assert module(torch.tensor([-3.7])).item() == pytest.approx(expected, rel=1e-4)
    many = LogSnrUncertainty(channels=2000)
    generator, squares = torch.Generator().manual_seed(2), []
    for _ in range(300):
        torch.nn.init.normal_(many.weight, generator=generator)
        squares.append(many(LOG_SNR).square().mean().item())
    assert sum(squares) / len(squares) == pytest.approx(1, abs=0.15)
    assert many.frequencies.std().item() == pytest.approx(2 * math.pi, rel=0.05)
    assert many.phases.mean().item() == pytest.approx(math.pi, rel=0.05)


@pytest.mark.parametrize("seed", [0, 1])
def test_training_finds_the_logarithm_of_the_mean_error(seed: int) -> None:
    module = trained(seed)
    with torch.no_grad():
        u = module(LOG_SNR)
    assert log_error(LOG_SNR).max() - log_error(LOG_SNR).min() > 4
    assert (u - log_error(LOG_SNR)).square().mean().sqrt().item() < 0.1
    # The gradient of a network's error is divided by exp(u): the weighted errors, and so the scales, are alike. The
    # features extrapolate, so that the outermost noise levels, which few samples have, take longest.
    weighted = torch.exp(log_error(LOG_SNR) - u)
    assert weighted[10:990].min().item() > 0.75
    assert weighted[10:990].max().item() < 1.3


def test_the_minimum_is_the_logarithm_of_the_mean_error_at_every_noise_level() -> None:
    """Without sampling noise. The loss is convex in the weight, so where its gradient vanishes is its minimum.

    The weight is found by linear algebra in float64: how far an optimizer in float32 gets depends on the processor.
    """
    module = LogSnrUncertainty()
    channels = len(module.weight)
    with torch.no_grad():
        columns = []
        for row in torch.eye(channels):
            module.weight.copy_(row)
            columns.append(module(LOG_SNR).double())
        features, wanted = torch.stack(columns, 1), log_error(LOG_SNR).double()
        module.weight.copy_(torch.linalg.lstsq(features, wanted[:, None], rcond=1e-6, driver="gelsd").solution[:, 0])
    torch.testing.assert_close(module(LOG_SNR), log_error(LOG_SNR), atol=0.01, rtol=0)

    def slope() -> float:
        (gradient,) = torch.autograd.grad(module.loss(log_error(LOG_SNR).exp(), LOG_SNR).mean(), [module.weight])
        return float(gradient.abs().max())

    assert slope() < 1e-4
    with torch.no_grad():
        module.weight *= 1.1
    assert slope() > 1e-2


def test_seed_decides_the_features() -> None:
    first, again, other = LogSnrUncertainty(seed=1), LogSnrUncertainty(seed=1), LogSnrUncertainty(seed=2)
    assert torch.equal(first.frequencies, again.frequencies)
    assert torch.equal(first.phases, again.phases)
    assert not torch.equal(first.frequencies, other.frequencies)
    state = torch.get_rng_state()
    LogSnrUncertainty(seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_state_dict_restores_u() -> None:
    module = trained(steps=20)
    fresh = LogSnrUncertainty(seed=9)
    fresh.load_state_dict(module.state_dict())
    assert set(module.state_dict()) == {"frequencies", "phases", "weight"}
    assert torch.equal(fresh(LOG_SNR), module(LOG_SNR))


def test_u_stays_in_single_precision_under_autocast() -> None:
    module = trained(steps=20)
    expected = module(LOG_SNR)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = module(LOG_SNR)
    assert u.dtype == torch.float32
    assert torch.equal(u, expected)
