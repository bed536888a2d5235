"""Inner products between the gradients of groups of samples: what every measure of conflict is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Gramian:
    """Gramians of the groups' gradients, one per layer.

    A group's gradient is that of the mean loss of its samples.

    Attributes:
        layers: Names of the modules that own parameters, as in the state dict, length L.
        values: Inner products (L, G, G), float64; rows and columns of empty groups are zero.
        counts: Samples per group (G,), int64.
        coverage: Share of the trainable parameters for which the inner products are exact.
        uncovered: Names of the others. What ``values`` hold of them is incomplete or wrong.
    """

    layers: tuple[str, ...]
    values: Tensor
    counts: Tensor
    coverage: float = 1.0
    uncovered: tuple[str, ...] = ()

    def total(self) -> Tensor:
        """The Gramian over all parameters (G, G)."""
        return self.values.sum(0)

    def by_block(self, blocks: Sequence[str]) -> dict[str, Tensor]:
        """The Gramian (G, G) of each block, in the order in which the model owns them.

        Args:
            blocks: Names of blocks, such as ``blocks.0``. Layers outside of them go by the first part of their name.
        """
        sums: dict[str, Tensor] = {}
        for layer, value in zip(self.layers, self.values, strict=True):
            block = next((b for b in blocks if layer == b or layer.startswith(f"{b}.")), layer.split(".")[0])
            sums[block] = sums[block] + value if block in sums else value.clone()
        return sums


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters whose gradients are measured, by name: those that require a gradient."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def layer_of(parameter: str) -> str:
    """The module that owns a parameter, by the parameter's name; the parameter itself if that is the model."""
    return parameter.rpartition(".")[0] or parameter


def by_layer(names: Sequence[str], values: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """Layers and their Gramians (L, G, G) from those of parameters (P, G, G)."""
    layers = tuple(dict.fromkeys(layer_of(name) for name in names))
    at = torch.tensor([layers.index(layer_of(name)) for name in names], dtype=torch.long, device=values.device)
    return layers, torch.zeros((len(layers), *values.shape[1:])).to(values).index_add_(0, at, values)


def layered_gramian(
    parameters: Mapping[str, nn.Parameter], products: Tensor, counts: Tensor, uncovered: Sequence[int]
) -> Gramian:
    """The Gramian of every layer from the products (P, G, G) of its parameters.

    Args:
        parameters: All parameters by name, in the order of ``products``.
        products: Their inner products.
        counts: Samples per group (G,).
        uncovered: Numbers of the parameters that the products are not exact for.
    """
    names = list(parameters)
    layers, values = by_layer(names, products)
    sizes = [parameter.numel() for parameter in parameters.values()]
    coverage = 1 - sum(sizes[index] for index in uncovered) / sum(sizes)
    return Gramian(layers, values, counts, coverage, tuple(names[index] for index in uncovered))


def gramian_by_subbatches(
    sample_loss: Callable[[Tensor], Tensor],
    parameters: Mapping[str, nn.Parameter],
    group: Tensor,
    num_groups: int,
    loss_scale: float = 1.0,
) -> Gramian:
    """The Gramian of every layer, by one forward and backward pass per group: the slow way, to check the other against.

    Exact, and independent of the model's operators. It holds all groups' gradients, G times the parameters, while it
    runs; ``.grad`` is left alone.

    Args:
        sample_loss: Maps indices (n,) into the batch to the losses of these samples (n,).
        parameters: Trainable parameters by their state-dict names.
        group: Group of each sample (B,), values 0 .. G - 1.
        num_groups: G.
        loss_scale: Factor on the loss during the backward pass, taken out again, against underflow under fp16.
    """
    counts = torch.bincount(group, minlength=num_groups)
    gradients = [torch.zeros((num_groups, p.numel()), device=p.device, dtype=p.dtype) for p in parameters.values()]
    for index in range(num_groups):
        samples = torch.nonzero(group == index).squeeze(1)
        if len(samples) == 0:
            continue
        loss = sample_loss(samples).mean()
        parts = torch.autograd.grad(loss * loss_scale, list(parameters.values()), allow_unused=True)
        for rows, part in zip(gradients, parts, strict=True):
            if part is not None:
                rows[index] = part.flatten() / loss_scale
    products = torch.stack([rows @ rows.T for rows in gradients]).double()
    layers, values = by_layer(list(parameters), products)
    return Gramian(layers, values, counts)
