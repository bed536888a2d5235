"""Whether the Gramians of `dtr-lab probe` are right: layers that another computation of the same batch contradicts.

By default that is one further backward pass of the first batch (`gradients.verification`), with ``--verify`` also one
backward pass for each group. In evaluation mode a forward pass gives the same losses every time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from experiments.probing.subject import Subject
from lightning_modules.denoiser import NoisedBatch
from lightning_modules.gradients import Gramian, gramian_by_subbatches
from lightning_modules.gradients.gramian import layer_of, trained_parameters
from lightning_modules.gradients.verification import WeightedGradient, deviations, weighted_gradient


def expected_gradient(subject: Subject, batch: NoisedBatch, group: Tensor, num_groups: int) -> WeightedGradient:
    """What the Gramian of a batch is held against, by a forward and a backward pass without the recorder."""
    losses = subject.module.sample_losses(batch, subject.backbone).loss
    return weighted_gradient(losses, trained_parameters(subject.backbone), group, num_groups)


def contradicted_layers(subject: Subject, gramian: Gramian, expected: WeightedGradient) -> set[str]:
    """The layers whose Gramians the gradient of a weighted sum contradicts, with a warning that names them."""
    wrong = wrong_layers(subject, gramian, deviations(gramian, expected))
    if wrong:
        warnings.warn(
            f"the first batch shows that the gradients of {', '.join(sorted(wrong))} are measured wrong: "
            "they count as not covered",
            stacklevel=2,
        )
    return wrong


def errors_by_subbatches(
    subject: Subject, batch: NoisedBatch, group: Tensor, num_groups: int, gramian: Gramian
) -> dict[str, float]:
    """Error of each layer's Gramian against a backward pass per group, relative to the layer's largest entry.

    Both ways compute in the weights' own precision.
    """

    def sample_loss(rows: Tensor) -> Tensor:
        y = None if batch.y is None else batch.y[rows]
        part = NoisedBatch(batch.x0[rows], y, batch.t[rows], batch.noise[rows])
        return subject.module.sample_losses(part, subject.backbone).loss

    slow = gramian_by_subbatches(sample_loss, trained_parameters(subject.backbone), group, num_groups)
    expected = dict(zip(slow.layers, slow.values, strict=True))
    errors = {}
    for layer, value in zip(gramian.layers, gramian.values, strict=True):
        largest = float(expected[layer].abs().max())
        difference = float((value - expected[layer]).abs().max())
        errors[layer] = difference / largest if largest else difference
    return errors


def tolerance(subject: Subject) -> float:
    """Relative error that rounding explains: 1e-3, and 0.1 of weights in half precision."""
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in trained_parameters(subject.backbone).values())
    return 0.1 if half else 1e-3


def wrong_layers(subject: Subject, gramian: Gramian, errors: Mapping[str, float]) -> set[str]:
    """The layers whose error, by name, is too large (or NaN) and that the Gramian does not name as uncovered itself."""
    admitted = {layer_of(name) for name in gramian.uncovered}
    most = tolerance(subject)
    return {layer for layer, error in errors.items() if not error <= most and layer not in admitted}
