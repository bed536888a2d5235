"""The slow, obvious Gramian: one backward pass per group over the retained vector of losses, parameter by parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.gradients import Gramian, GramianRecorder
from lightning_modules.gradients.gramian import layer_of

Losses = Callable[[], Tensor]
"""Runs the model: losses of the samples (B,)."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """What the recorder should find.

    Attributes:
        layers: Gramian (G, G) of each layer.
        grad: Gradient of each parameter as training computes it; None where there is none.
    """

    layers: dict[str, Tensor]
    grad: dict[str, Tensor | None]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def group_gradients(losses: Tensor, parameters: Mapping[str, nn.Parameter], group: Tensor, num_groups: int) -> Any:
    """Gradients (G, n) of the groups' mean losses by parameter, one ``autograd.grad`` call per group."""
    rows = {name: torch.zeros(num_groups, p.numel(), dtype=p.dtype) for name, p in parameters.items()}
    for index in range(num_groups):
        own = losses[group == index]
        if len(own):
            parts = torch.autograd.grad(own.mean(), list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, part in zip(parameters, parts, strict=True):
                if part is not None:
                    rows[name][index] = part.flatten()
    return rows


def gramians(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gramian (G, G) of each layer, by the name of the module that owns the parameters."""
    found: dict[str, Tensor] = {}
    for name, row in rows.items():
        layer = layer_of(name)
        found[layer] = found.get(layer, 0) + row.double() @ row.double().T
    return found


def truth(model: nn.Module, losses: Losses, group: Tensor, num_groups: int, reduction: str = "mean") -> Truth:
    """Brute force; leaves no gradients behind."""
    parameters = trainable(model)
    torch.manual_seed(0)
    vector = losses()
    layers = gramians(group_gradients(vector, parameters, group, num_groups))
    model.zero_grad(set_to_none=True)
    getattr(vector, reduction)().backward()
    grad = {name: p.grad for name, p in parameters.items()}
    model.zero_grad(set_to_none=True)
    return Truth(layers, grad)


def record(
    model: nn.Module, losses: Losses, group: Tensor, num_groups: int, **settings: Any
) -> tuple[Gramian, dict[str, Tensor | None]]:
    """One training step's forward and backward pass under the recorder: the Gramian and the gradients."""
    model.zero_grad(set_to_none=True)
    recorder = GramianRecorder(model, group, num_groups, **settings)
    torch.manual_seed(0)
    with recorder:
        getattr(losses(), settings.get("reduction", "mean"))().backward()
    gramian = recorder.result()
    return gramian, {name: p.grad for name, p in trainable(model).items()}


def errors(gramian: Gramian, expected: Truth) -> dict[str, float]:
    """Largest relative error of each layer's Gramian.

    A layer whose true gradient is mere rounding noise (keys' biases under softmax) is held against the whole model.
    """
    assert set(gramian.layers) == set(expected.layers)
    noise = 1e-24 * max(float(value.abs().max()) for value in expected.layers.values())
    found = {}
    for layer, value in zip(gramian.layers, gramian.values, strict=True):
        target = expected.layers[layer]
        size = float(target.abs().max())
        found[layer] = float((value - target).abs().max()) / (size if size > noise else max(noise * 1e24, 1e-300))
    return found


def gradient_error(grad: Mapping[str, Tensor | None], expected: Truth) -> float:
    """Largest difference between gradients, on the scale of the model's largest."""
    scale = max(float(g.abs().max()) for g in expected.grad.values() if g is not None)
    worst = 0.0
    for name, target in expected.grad.items():
        own = grad[name]
        assert (own is None) == (target is None), f"{name}: with the recorder {own}, without {target}"
        if own is not None and target is not None:
            worst = max(worst, float((own - target).abs().max()) / scale)
    return worst


def assert_exact(
    model: nn.Module, losses: Losses, group: Tensor, num_groups: int, tolerance: float = 1e-10, **settings: Any
) -> Gramian:
    """Every layer's Gramian and every gradient equal brute force, and the recorder says so."""
    expected = truth(model, losses, group, num_groups, settings.get("reduction", "mean"))
    gramian, grad = record(model, losses, group, num_groups, **settings)
    assert gramian.coverage == 1.0, gramian.uncovered
    wrong = {layer: error for layer, error in errors(gramian, expected).items() if not error < tolerance}
    assert wrong == {}
    assert gradient_error(grad, expected) < tolerance
    assert gramian.counts.tolist() == torch.bincount(group, minlength=num_groups).tolist()
    return gramian


def assert_honest(model: nn.Module, losses: Losses, group: Tensor, num_groups: int) -> Gramian:
    """Gradients equal brute force, and each layer's Gramian does, or one of its parameters is listed as uncovered."""
    expected = truth(model, losses, group, num_groups)
    gramian, grad = record(model, losses, group, num_groups)
    assert gradient_error(grad, expected) < 1e-10
    wrong = {layer for layer, error in errors(gramian, expected).items() if not error < 1e-10}
    assert wrong <= {layer_of(name) for name in gramian.uncovered}, f"uncovered: {gramian.uncovered}"
    sizes = {name: p.numel() for name, p in trainable(model).items()}
    missing = sum(sizes[name] for name in gramian.uncovered)
    assert gramian.coverage == pytest.approx(1 - missing / sum(sizes.values()))
    return gramian
