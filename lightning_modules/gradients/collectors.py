"""What becomes of the groups' gradients: they pass by piece by piece, and only statistics of them are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

_BLOCK = 8
"""Groups per block of a product of rows: matrix libraries are fastest on blocks of this size, and half of the blocks
follow by symmetry."""
_COLUMNS = 1024
"""Columns summed at a time where rows exceed the cache; it also bounds the rounding error of long sums."""
_CACHED_COLUMNS = 32 * _COLUMNS


class Collector(Protocol):
    """Receives the gradients of groups, parameter by parameter.

    Rows are parts of the gradient of the loss that was back-propagated. Multiplied by the factors that `finish` brings,
    they are the gradients of the groups' mean losses.
    """

    def collect(self, index: int, start: int, rows: Tensor) -> None:
        """Takes a piece.

        Args:
            index: Number of the parameter, in the order of the recorder's ``names``.
            start: Where the piece begins in the flattened parameter.
            rows: (G, n), float32 or float64. Overwritten after the call.
        """

    def finish(self, factors: Tensor) -> None:
        """Ends a measurement: ``factors`` (G,) turn the rows into gradients of the groups' mean losses."""


class GramianCollector:
    """Keeps the inner products of the groups' gradients, for each parameter.

    Attributes:
        values: (parameters, G, G), float64 (float32 on devices without it).
        takes_products: Whether inner products may come in place of the gradients, where they are cheaper.
    """

    takes_products = True

    def __init__(self, num_parameters: int, num_groups: int, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.zeros((num_parameters, num_groups, num_groups), dtype=dtype, device=device)

    def collect(self, index: int, start: int, rows: Tensor) -> None:
        """Adds the inner products of a piece."""
        add_inner_products(rows, self.values[index])

    def collect_products(self, index: int, products: Tensor) -> None:
        """Adds inner products (G, G) that were obtained without the rows."""
        self.values[index] += products

    def finish(self, factors: Tensor) -> None:
        """Scales the products."""
        factors = factors.to(self.values)
        self.values *= factors[:, None] * factors


def add_inner_products(rows: Tensor, out: Tensor) -> None:
    """Adds rows @ rows' for ``rows`` (G, n) to ``out`` (G, G), without loss of precision on devices that offer less."""
    groups, columns = rows.shape
    with full_precision(rows.device):
        if rows.is_cuda or (groups <= _BLOCK and columns <= _CACHED_COLUMNS):
            out += rows @ rows.T
            return
        for first in range(0, groups, _BLOCK):
            left = rows[first : first + _BLOCK]
            for second in range(first, groups, _BLOCK):
                product = _long_product(left, rows[second : second + _BLOCK])
                out[first : first + _BLOCK, second : second + _BLOCK] += product
                if second > first:
                    out[second : second + _BLOCK, first : first + _BLOCK] += product.T


def _long_product(left: Tensor, right: Tensor) -> Tensor:
    columns = left.shape[1]
    if columns <= _CACHED_COLUMNS:
        return left @ right.T
    whole = columns // _COLUMNS * _COLUMNS
    first = left[:, :whole].view(len(left), -1, _COLUMNS).transpose(0, 1)
    second = right[:, :whole].view(len(right), -1, _COLUMNS).permute(1, 2, 0)
    product = torch.bmm(first, second).sum(0)
    return product if whole == columns else product.addmm_(left[:, whole:], right[:, whole:].T)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keeps a GPU from rounding float32 factors to TensorFloat-32 (10 bits), whatever the user allows elsewhere."""
    if device.type != "cuda" or torch.get_float32_matmul_precision() == "highest":
        yield
        return
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
