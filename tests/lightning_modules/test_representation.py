"""Unbiased HSIC against its definition over quadruples, CKA against the direct formula, streams against the model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_modules.backbones.unet import UNet
from lightning_modules.representation import RepresentationMeter, unbiased_hsic
from lightning_modules.routing import masked_block
from tests.conftest import UNET


def kernels(count: int, n: int, width: int = 3, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.transpose(1, 2)


def hsic_over_quadruples(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """The U-statistic that `unbiased_hsic` computes in closed form: Song et al. (2012), equation 4, term by term."""
    n = len(k)

    def mean(values) -> float:
        listed = list(values)
        return sum(listed) / len(listed)

    pairs = mean(k[i, j] * l[i, j] for i, j in itertools.permutations(range(n), 2))
    triples = mean(k[i, j] * l[i, q] for i, j, q in itertools.permutations(range(n), 3))
    quadruples = mean(k[i, j] * l[q, r] for i, j, q, r in itertools.permutations(range(n), 4))
    return pairs + quadruples - 2 * triples


def test_hsic_is_the_u_statistic():
    both = kernels(2, 6)
    found = unbiased_hsic(both)
    for i, j in itertools.product(range(2), repeat=2):
        assert float(found[i, j]) == pytest.approx(hsic_over_quadruples(both[i].numpy(), both[j].numpy()))


def test_hsic_does_not_see_means_rotations_or_order():
    x = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    order = torch.randperm(12)
    changed = (x + 3.0)[:, order] @ rotation
    torch.testing.assert_close(
        unbiased_hsic(changed @ changed.transpose(1, 2)), unbiased_hsic(x @ x.transpose(1, 2)), rtol=1e-9, atol=1e-9
    )


def test_independent_representations_have_no_hsic_on_average_where_the_usual_estimate_has():
    n, width = 8, 64
    unbiased, usual = [], []
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    for seed in range(300):
        both = kernels(2, n, width, seed)
        found = unbiased_hsic(both)
        unbiased.append(float(found[0, 1]) / math.sqrt(float(found[0, 0] * found[1, 1])))
        k, l = centre @ both[0] @ centre, centre @ both[1] @ centre  # noqa: E741
        usual.append(float((k * l).sum() / (k.norm() * l.norm())))
    assert abs(np.mean(unbiased)) < 3 * np.std(unbiased) / math.sqrt(300)
    assert np.mean(usual) > 0.8


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="at least 4 images"):
        unbiased_hsic(kernels(1, 3))


def streams_of(module, x0, y, timesteps, features) -> dict[str, list[torch.Tensor]]:
    """Block -> centred representations (n, p) at each timestep, float64, with the noise that the meter draws."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    found: dict[str, list[torch.Tensor]] = {}

    def keep(block, values):
        flat = values.double().mean(1) if features == "pooled" else values.double().flatten(1)
        found.setdefault(block, []).append(flat - flat.mean(0))

    handles = module.backbone.observe_streams(keep)
    with torch.no_grad():
        for t in timesteps:
            times = torch.full((len(x0),), t)
            module.backbone(module.diffusion.q_sample(x0, times, noise), times, y)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("features", ["flat", "pooled"])
def test_what_is_measured_is_the_hsic_of_the_streams(make_denoiser, batch, features):
    module = make_denoiser().eval()
    meter = RepresentationMeter(module, module.backbone, [5, 300, 700], features=features)
    hsic = meter.measure(*batch, torch.Generator().manual_seed(3))
    streams = streams_of(module, *batch, [5, 300, 700], features)
    assert hsic.keys() == streams.keys() == module.backbone.block_channels.keys()
    for block, values in hsic.items():
        expected = unbiased_hsic(torch.stack([x @ x.T for x in streams[block]]))
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_cka_of_many_images_is_the_direct_formula(make_denoiser):
    """With far more images than features the bias vanishes: |Y'X|^2 / (|X'X| |Y'Y|) (Kornblith et al., equation 3)."""
    module = make_denoiser().eval()
    x0 = torch.rand(1500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.arange(1500) % 10
    meter = RepresentationMeter(module, module.backbone, [5, 700], features="pooled")
    hsic = meter.measure(x0, y, torch.Generator().manual_seed(3))
    for block, (x, z) in streams_of(module, x0, y, [5, 700], "pooled").items():
        direct = (z.T @ x).square().sum() / ((x.T @ x).norm() * (z.T @ z).norm())
        cka = hsic[block][0, 1] / (hsic[block][0, 0] * hsic[block][1, 1]).sqrt()
        assert float(cka) == pytest.approx(float(direct), abs=0.01)


def test_noise_is_shared_or_not(make_denoiser, batch):
    module = make_denoiser().eval()
    found = {
        noise: RepresentationMeter(module, module.backbone, [999, 999], noise=noise).measure(
            *batch, torch.Generator().manual_seed(0)
        )["blocks.1"]
        for noise in ("shared", "independent")
    }
    same, own = (values[0, 1] / (values[0, 0] * values[1, 1]).abs().sqrt() for values in found.values())
    assert float(same) == pytest.approx(1.0)
    assert float(own) < 0.9


@pytest.mark.parametrize("method", ["baseline", "dtr"])
def test_the_stream_of_a_dit_is_what_the_next_block_gets_before_its_mask(make_denoiser, batch, method):
    module = make_denoiser(method).eval()
    net, (x, y) = module.backbone, batch
    t = torch.arange(16) * 60
    seen = {}
    handles = net.observe_streams(lambda block, values: seen.__setitem__(block, values))
    with torch.no_grad():
        net(x, t, y)
        tokens, conditioning = net.x_embedder(x) + net.pos_embed, net._condition(t, y)
        for index, block in enumerate(net.blocks):
            if net.routing is None:
                tokens = block(tokens, conditioning)
            else:
                tokens = masked_block(block, net.routing(t)[index], tokens, conditioning)
            torch.testing.assert_close(seen[f"blocks.{index}"], tokens, rtol=1e-5, atol=1e-5)
    for handle in handles:
        handle.remove()
    seen.clear()
    with torch.no_grad():
        net(x, t, y)
    assert not seen


def test_the_stream_of_a_unet_is_what_its_residual_blocks_put_out(batch):
    torch.manual_seed(0)
    net = UNet(UNET).eval()
    seen = {}
    handles = net.observe_streams(lambda block, values: seen.__setitem__(block, values))
    expected = {}
    blocks = net._residual_blocks()
    handles += [
        block.register_forward_hook(lambda module, args, output, name=name: expected.__setitem__(name, output))
        for name, block in blocks.items()
    ]
    with torch.no_grad():
        net(batch[0], torch.arange(16), batch[1])
    for handle in handles:
        handle.remove()
    assert seen.keys() == expected.keys() == net.block_channels.keys()
    for name, output in expected.items():
        assert torch.equal(seen[name], output.flatten(2).transpose(1, 2))
