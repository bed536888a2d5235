"""Half precision: autocast, gradient scalers, and what overflows."""

import pytest
import torch
from torch import nn

from lightning_modules.backbones.dit import DiT, DiTConfig
from lightning_modules.gradients import GramianRecorder
from tests.lightning_modules.gradients.support import GROUP, normal, shaken, squares
from tests.oracles.group_gradients import errors, gradient_error, gramians, group_gradients, record, trainable, truth

BF16 = 2.0**-8
"""Relative spacing of bfloat16: rounding of one product to nearest errs by at most half of it."""


def network():
    torch.manual_seed(0)
    layers = (nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8), nn.RMSNorm(8), nn.Linear(8, 4))
    return shaken(nn.Sequential(*layers)).float()


X = normal(8, 6, 8).float()


def dit():
    torch.manual_seed(0)
    config = DiTConfig(input_size=8, patch_size=2, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    return shaken(DiT(config)).float()


def images():
    return normal(8, 2, 8, 8).float(), torch.tensor([10, 900, 400, 300, 20, 750, 600, 5]), torch.arange(8) % 3


@pytest.mark.parametrize(("make", "inputs"), [(network, lambda: (X,)), (dit, images)])
def test_float32_is_exact_to_its_rounding(make, inputs):
    model, x = make(), inputs()
    expected = truth(model, lambda: squares(model(*x)), GROUP, 5)
    gramian, grad = record(model, lambda: squares(model(*x)), GROUP, 5)
    assert gramian.coverage == 1.0
    scale = max(float(value.abs().max()) for value in expected.layers.values())
    for layer, value in zip(gramian.layers, gramian.values, strict=True):
        target = expected.layers[layer]
        assert (value - target).abs().max() < 2e-5 * target.abs().max() + 1e-9 * scale, layer
    assert gradient_error(grad, expected) < 1e-5


@pytest.mark.parametrize(("make", "inputs"), [(network, lambda: (X,)), (dit, images)])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, BF16), (torch.float16, BF16 / 8)])
def test_autocast_is_within_its_rounding_of_float32(make, inputs, dtype, unit):
    """Against brute force in float32; each gradient errs by some units of the last place, more through more layers.

    The bound is 16 units on the norm of a layer's gradients, measured on the groups' gradients that brute force finds
    under the same autocast, whose own error it must not exceed by more than half.
    """
    model, x = make(), inputs()

    def half():
        with torch.autocast("cpu", dtype=dtype):
            return squares(model(*x).float())

    exact = truth(model, lambda: squares(model(*x)), GROUP, 5)
    rounded = gramians(group_gradients(half(), trainable(model), GROUP, 5))
    gramian, grad = record(model, half, GROUP, 5)
    assert gramian.coverage == 1.0, gramian.uncovered
    for layer, value in zip(gramian.layers, gramian.values, strict=True):
        size = float(exact.layers[layer].abs().max())
        unavoidable = float((rounded[layer] - exact.layers[layer]).abs().max())
        assert float((value - exact.layers[layer]).abs().max()) < 1.5 * unavoidable + 4 * unit * size, layer
    assert gradient_error(grad, exact) < 16 * unit


def test_small_inputs_of_an_rms_norm_in_half_precision():
    """Its default epsilon is that of the input's precision: variances near it tell one from the other."""
    model = nn.RMSNorm(8).bfloat16()
    x = (0.05 * normal(8, 6, 8)).bfloat16()
    exact = truth(model, lambda: squares(model(x).float()), GROUP, 5)
    gramian, _ = record(model, lambda: squares(model(x).float()), GROUP, 5)
    assert max(errors(gramian, exact).values()) < 16 * BF16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype):
    model = network().to(dtype)
    x = X.to(dtype)
    wide = network().to(dtype).float()
    expected = truth(wide, lambda: squares(wide(x.float())), GROUP, 5)
    gramian, grad = record(model, lambda: squares(model(x).float()), GROUP, 5)
    assert gramian.coverage == 1.0
    scale = max(float(value.abs().max()) for value in expected.layers.values())
    for layer, value in zip(gramian.layers, gramian.values, strict=True):
        assert (value - expected.layers[layer]).abs().max() < 16 * BF16 * scale, layer
    assert all(g.dtype == dtype for g in grad.values())


def test_a_gradient_scaler_cancels():
    model = network()
    expected = truth(model, lambda: squares(model(X)), GROUP, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(torch.zeros(()))  # makes the scale
    recorder = GramianRecorder(model, GROUP, 5, scale=torch.full((5,), 1 / scaler.get_scale()))
    with recorder:
        scaler.scale(squares(model(X)).mean()).backward()
    gramian = recorder.result()
    assert gramian.coverage == 1.0
    assert max(errors(gramian, expected).values()) < 1e-4
    scaler.unscale_(optimizer)
    assert gradient_error({name: p.grad for name, p in trainable(model).items()}, expected) < 1e-5
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("rows", [1, 6])
def test_overflow_shows(rows):
    """In float16 a gradient beyond 65,504 is infinite: what is finite all the same must be right."""
    model = nn.Linear(8, 4).half()
    x = X.half()[:, :rows] * 100
    wide = nn.Linear(8, 4)
    wide.load_state_dict(model.state_dict())
    for factor in (1.0, 2.0**6, 2.0**16, 2.0**24):
        expected = truth(wide, lambda factor=factor: wide(x.float()).square().mean((1, 2)) * factor, GROUP, 5)
        gramian, _ = record(model, lambda factor=factor: model(x).float().square().mean((1, 2)) * factor, GROUP, 5)
        finite = gramian.values.isfinite()
        target = torch.stack([expected.layers[layer] for layer in gramian.layers])
        scale = torch.stack([value.abs().max() for value in target])[:, None, None]
        assert (((gramian.values - target).abs() / scale)[finite] < 0.02).all()
    assert not finite[:, gramian.counts > 0][:, :, gramian.counts > 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_types_are_those_without_the_recorder(dtype):
    model = network().to(dtype)
    scalar = nn.Parameter(torch.tensor(0.5, dtype=dtype))
    model.scalar = scalar
    x = X.to(dtype)

    def run():
        y = model[0](x)
        mixed = torch.where(y > 0, y, scalar), torch.lerp(y, scalar, 0.5), y * scalar, scalar * (y > 0)
        return [tensor.dtype for tensor in (*mixed, model(x))]

    plain = run()
    with GramianRecorder(model, GROUP, 5):
        recorded = run()
    assert recorded == plain


def test_float64_scalars_are_not_rounded_to_the_default_type():
    torch.manual_seed(0)
    model = nn.Module()
    model.scalar = nn.Parameter(torch.tensor(1 / 3, dtype=torch.float64))
    x = normal(8, 3)
    with GramianRecorder(model, GROUP, 5):
        y = torch.where(x > 0, x, model.scalar)
    assert (y[x <= 0] == 1 / 3).all()
