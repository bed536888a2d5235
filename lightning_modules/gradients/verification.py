"""An independent check of a Gramian, at the price of one ordinary forward and backward pass.

For random weights w the gradient of sum_g w_g (mean loss of group g) has the squared norm w' M w in every layer, if M
is that layer's Gramian. Autograd computes the left side without any splitting, so whatever the split got wrong shows up
with probability one, samples that influence one another included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_modules.gradients.gramian import Gramian, by_layer, layer_of


@dataclasses.dataclass(frozen=True)
class WeightedGradient:
    """Squared norms of the gradient of a randomly weighted sum of the groups' mean losses.

    Attributes:
        weights: (G,), standard normal; 0 for empty groups.
        squared_norms: By layer.
    """

    weights: Tensor
    squared_norms: dict[str, float]


def weighted_gradient(
    sample_loss: Tensor,
    parameters: Mapping[str, nn.Parameter],
    group: Tensor,
    num_groups: int,
    *,
    loss_scale: float = 1.0,
    processes: Literal["global", "local"] = "global",
    seed: int = 0,
) -> WeightedGradient:
    """The left side of the check, from a forward pass outside of any recorder.

    Args:
        sample_loss: Loss of each sample (B,), with its graph; as in the recorded pass (same data, noise and dropout).
        parameters: Trainable parameters by name.
        group: Group of each sample (B,).
        num_groups: G.
        loss_scale: Factor on the loss during the backward pass, taken out again, against underflow under fp16.
        processes: Whether the Gramian is that of all processes' samples, or of this one's.
        seed: Seed of the weights.
    """
    counts = torch.bincount(group, minlength=num_groups)
    several = processes == "global" and dist.is_initialized()
    if several:
        dist.all_reduce(counts)
    weights = torch.randn(num_groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = torch.where(counts > 0, weights.to(group.device), 0.0)
    loss = (sample_loss * (weights / counts.clamp_min(1))[group].to(sample_loss)).sum()
    gradients = torch.autograd.grad(
        loss * loss_scale, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    for gradient in gradients if several else ():
        dist.all_reduce(gradient)
    norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients])
    squares = norms.div(loss_scale).square()
    layers, values = by_layer(list(parameters), squares[:, None, None])
    return WeightedGradient(weights, dict(zip(layers, values.flatten().tolist(), strict=True)))


def deviations(gramian: Gramian, expected: WeightedGradient) -> dict[str, float]:
    """|w' M w - squared norm| of each layer, relative to what rounding acts on: the sum of |w_g w_h M_gh|."""
    weights = expected.weights.to(gramian.values)
    products = weights[:, None] * weights * gramian.values
    size = products.abs().sum((1, 2)).tolist()
    found = products.sum((1, 2)).tolist()
    return {
        layer: abs(value - expected.squared_norms[layer]) / max(magnitude, expected.squared_norms[layer], 1e-300)
        for layer, value, magnitude in zip(gramian.layers, found, size, strict=True)
    }


def without_layers(gramian: Gramian, wrong: set[str], parameters: Mapping[str, nn.Parameter]) -> Gramian:
    """The Gramian with the parameters of some layers counted as uncovered."""
    uncovered = [name for name in parameters if layer_of(name) in wrong or name in gramian.uncovered]
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    coverage = 1 - sum(sizes[name] for name in uncovered) / sum(sizes.values())
    return dataclasses.replace(gramian, coverage=coverage, uncovered=tuple(uncovered))
