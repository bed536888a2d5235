"""For which parameters the Gramian is exact: nothing is counted that cannot be vouched for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_modules.gradients.ledger import Ledger


def uncovered_parameters(
    parameters: Sequence[nn.Parameter],
    ledger: Ledger,
    products: Tensor,
    norms: Sequence[Tensor | None] | None,
    half: bool,
) -> list[int]:
    """Parameters whose group gradients are not known to be complete.

    The sum of all products is the squared norm of the whole gradient; if autograd's has another, then part of it came
    by a way that was not seen.

    Args:
        parameters: All of them.
        ledger: What arrived.
        products: (parameters, G, G), of the parts of the back-propagated loss.
        norms: Norm of each parameter's gradient in this measurement, None where there is none; None in all if the
            backward pass was not seen.
        half: Whether parts of the model ran in half precision.
    """
    uncovered = set(ledger.uncovered)
    for index in range(len(parameters)):
        if index not in ledger.delivered and (norms is None or norms[index] is not None):
            uncovered.add(index)
    several = dist.is_initialized() and dist.get_world_size() > 1  # then .grad is, or will be, an average over them
    if norms is not None and not several:
        zero = products.new_zeros(())
        expected = torch.stack([zero if norm is None else norm.to(products) for norm in norms]).square()
        deviation = (products.sum((1, 2)) - expected).abs()
        suspect = deviation > _tolerance(parameters, half) * products.abs().sum((1, 2))
        overflow = ~products.isfinite().all(2).all(1)  # a gradient scaler deals with it
        uncovered.update(torch.nonzero(suspect & ~overflow).flatten().tolist())
    return sorted(uncovered)


def refuse_batch_statistics(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises on a batch norm that uses the batch's statistics.

    Raises:
        ValueError: Then a sample's loss depends on all samples, and no gradient belongs to a group.
    """
    if kwargs.get("training", args[5] if len(args) > 5 else False):
        raise ValueError(
            "the model has a batch norm in training mode: it mixes the samples of a batch, so that no gradient belongs "
            "to one group of them. Use group or layer norm, or put the batch norm in evaluation mode"
        )


def _tolerance(parameters: Sequence[nn.Parameter], half: bool) -> float:
    """How far rounding can carry the sum of products from the squared norm, relative to their absolute sum."""
    if half or any(p.dtype in (torch.float16, torch.bfloat16) for p in parameters):
        return 5e-2
    return 1e-9 if all(p.dtype == torch.float64 for p in parameters) else 1e-3


def accumulated_norms(parameters: Sequence[nn.Parameter], before: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Norms of what has been added to ``.grad`` since it was as in ``before``; None where there is no gradient."""
    return [
        None if p.grad is None else gradient_norm(p.grad if old is None else p.grad - old)
        for p, old in zip(parameters, before, strict=True)
    ]


def gradient_norm(gradient: Tensor) -> Tensor:
    """The Euclidean norm of a gradient, dense or sparse, not summed in half precision."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.linalg.vector_norm(values, dtype=torch.float32 if values.element_size() < 4 else None)
