"""Inner products between the gradients of groups of samples: what every probe of conflict is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Gramian:
    """Gramians of the groups' gradients, one per layer.

    A group's gradient is that of the mean loss of its samples. The Gramian of the whole model is ``values.sum(0)``.

    Attributes:
        layers: Names of the modules that own parameters, as in the state dict, length L.
        values: Inner products (L, G, G); rows and columns of empty groups are zero.
        counts: Samples per group (G,), int64.
        losses: Mean loss per group (G,); NaN for empty groups.
    """

    layers: tuple[str, ...]
    values: Tensor
    counts: Tensor
    losses: Tensor


def split_tasks(task: Tensor, num_tasks: int, halves: int) -> Tensor:
    """Deals each task's samples out to ``halves`` disjoint groups in turn.

    Args:
        task: Task of each sample, (B,), in any order.
        num_tasks: K.
        halves: 1 or more groups per task.

    Returns:
        Group of each sample, (B,): ``task * halves + half``.
    """
    earlier = nn.functional.one_hot(task, num_tasks).cumsum(0) - 1
    position = earlier.gather(1, task[:, None]).squeeze(1)
    return task * halves + position % halves


def gramian_by_subbatches(
    sample_loss: Callable[[Tensor], Tensor],
    parameters: Mapping[str, nn.Parameter],
    group: Tensor,
    num_groups: int,
    loss_scale: float = 1.0,
) -> Gramian:
    """The Gramian of every layer, by one forward and backward pass per group.

    Exact and independent of the model's operators. In arithmetic it costs one further training step; small groups use
    the hardware less well, so in time it costs more (``experiments.benchmarks.overhead`` measures how much). It holds
    all groups' gradients, G times the parameters, while it runs; ``.grad`` is left alone.

    Args:
        sample_loss: Maps indices (n,) into the batch to the losses of these samples (n,).
        parameters: Trainable parameters by their state-dict names.
        group: Group of each sample (B,), values 0 .. G - 1.
        num_groups: G.
        loss_scale: Factor on the loss during the backward pass, taken out again, against underflow under fp16.
    """
    tensors = list(parameters.values())
    counts = torch.bincount(group, minlength=num_groups)
    losses = torch.full((num_groups,), torch.nan, device=group.device, dtype=tensors[0].dtype)
    gradients = [
        torch.zeros((num_groups, tensor.numel()), device=tensor.device, dtype=tensor.dtype) for tensor in tensors
    ]
    for index in range(num_groups):
        samples = torch.nonzero(group == index).squeeze(1)
        if len(samples) == 0:
            continue
        loss = sample_loss(samples).mean()
        losses[index] = loss.detach()
        parts = torch.autograd.grad(loss * loss_scale, tensors, allow_unused=True)
        for rows, part in zip(gradients, parts, strict=True):
            if part is not None:
                rows[index] = part.flatten() / loss_scale
    return _by_layer(list(parameters), gradients, counts, losses)


def _by_layer(names: list[str], gradients: list[Tensor], counts: Tensor, losses: Tensor) -> Gramian:
    layers: dict[str, Tensor] = {}
    for name, rows in zip(names, gradients, strict=True):
        layer = name.rpartition(".")[0] or name
        product = rows @ rows.T
        layers[layer] = layers[layer] + product if layer in layers else product
    return Gramian(tuple(layers), torch.stack(list(layers.values())), counts, losses)
