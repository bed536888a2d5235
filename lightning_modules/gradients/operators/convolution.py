"""Convolutions of any dimension, transposed ones included."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_modules.gradients.collectors import add_inner_products
from lightning_modules.gradients.ledger import Ledger, Operand
from lightning_modules.gradients.operators.linear import split_weight

if TYPE_CHECKING:
    from lightning_modules.gradients.recorder import GramianRecorder

Sizes = int | Sequence[int]
SMALL_GRID = 64
"""Positions up to which a convolution's gradient is taken as a product of patches: about where both cost the same."""


class ConvolutionOperation:
    """Splits the gradients of a convolution's weight and bias (p,).

    Args:
        x: Input (rows, channels, ...), padded where padding is asymmetric.
        weight: None if it is not trained.
        bias: None if there is none or it is not trained.
        geometry: Stride, padding, dilation, whether transposed, output padding, groups, as ATen takes them.
    """

    def __init__(self, x: Tensor, weight: Operand | None, bias: Operand | None, geometry: tuple[Any, ...]) -> None:
        self.weight, self.bias = weight, bias
        self.operands = tuple(operand for operand in (weight, bias) if operand is not None)
        self.saved: tuple[Tensor, ...] = () if weight is None else (x,)
        self.geometry = geometry

    def split(self, ledger: Ledger, saved: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
        """See `Operation.split`."""
        totals: list[Tensor | None] = []
        if self.weight is not None:
            (x,) = saved
            if self._cuts_patches(self.weight.tensor):
                patches = _patches(x, self.weight.tensor.shape[2:], grad.shape[2:])
                totals.append(split_weight(ledger, self.weight, grad.flatten(2).transpose(1, 2), patches))
            elif self._is_small(x, grad) and ledger.takes_products(self.weight):
                totals.append(self._split_small(ledger, self.weight, x, grad))
            else:
                totals.append(ledger.deliver(self.weight, self._pieces(ledger, x, grad, self.weight.tensor)))
        if self.bias is not None:
            totals.append(ledger.deliver(self.bias, [(0, ledger.groups.sum(grad.flatten(2).sum(2)))]))
        return totals

    def _cuts_patches(self, weight: Tensor) -> bool:
        """Whether it is a linear layer on patches that do not overlap, as a patch embedding."""
        stride, padding, dilation, transposed, _, channel_groups = self.geometry
        return (
            not transposed
            and weight[0, 0].numel() > 1
            and channel_groups == 1
            and tuple(stride) == tuple(weight.shape[2:])
            and not any(padding)
            and all(d == 1 for d in dilation)
        )

    def _is_small(self, x: Tensor, grad: Tensor) -> bool:
        """Whether all patches at once are cheaper than the convolution's own kernel, called for each group."""
        _, _, dilation, transposed, _, channel_groups = self.geometry
        plain = not transposed and channel_groups == 1 and all(d == 1 for d in dilation)
        return plain and grad[0, 0].numel() <= SMALL_GRID and x.device.type == "cpu"

    def _split_small(self, ledger: Ledger, weight: Operand, x: Tensor, grad: Tensor) -> Tensor:
        """As for a linear layer on overlapping patches, channels last: inner products do not mind the order."""
        kernel = weight.tensor.shape[2:]
        groups = ledger.groups
        stride, padding, *_ = self.geometry
        folded = len(x) // groups.size
        x, grad = (groups.arrange(t.unflatten(0, (groups.size, folded))).flatten(0, 1) for t in (x, grad))
        grad = grad.flatten(2).to(x.dtype)
        rows = ledger.workspace(groups.num_groups * weight.tensor.numel(), x).view(groups.num_groups, grad.shape[1], -1)
        if min(groups.counts_list) == 0:
            rows.zero_()
        for index, members in groups.slices():
            part = slice(members.start * folded, members.stop * folded)
            patches = _overlapping_patches(x[part], kernel, stride, padding).reshape(-1, rows.shape[-1])
            torch.mm(grad[part].transpose(0, 1).flatten(1), patches, out=rows[index])
        products = torch.zeros((groups.num_groups, groups.num_groups), dtype=torch.float64)
        add_inner_products(rows.flatten(1), products)
        total = rows.sum(0)
        ledger.deliver_products(weight, products)
        return total.view(len(total), *kernel, -1).movedim(-1, 1).to(weight.tensor.dtype).contiguous()

    def _pieces(self, ledger: Ledger, x: Tensor, grad: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
        groups = ledger.groups
        folded = len(x) // groups.size
        x, grad = (groups.arrange(t.unflatten(0, (groups.size, folded))).flatten(0, 1) for t in (x, grad))
        # The weight's values do not matter to its gradient; half precision needs it in the input's type.
        weight = weight.detach().to(x.dtype)
        rows = ledger.workspace(groups.num_groups * weight.numel(), x).view(groups.num_groups, -1)
        if min(groups.counts_list) == 0:
            rows.zero_()
        for index, members in groups.slices():
            part = slice(members.start * folded, members.stop * folded)
            _, gradient, _ = torch.ops.aten.convolution_backward(
                grad[part], x[part], weight, None, *self.geometry, [False, True, False]
            )
            rows[index] = gradient.flatten()
        yield 0, rows


def _overlapping_patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Patches (rows, positions, kernel, channels) of x (rows, channels, ...), as a view of one padded copy."""
    x = F.pad(x.movedim(1, -1), (0, 0, *(side for size in reversed(padding) for side in (size, size))))
    for dim, size in enumerate(kernel):
        x = x.unfold(dim + 1, size, stride[dim])
    return x.movedim(len(kernel) + 1, -1)


def _patches(x: Tensor, kernel: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Patches (rows, positions, channels * kernel size) of x (rows, channels, ...)."""
    rows, channels = x.shape[:2]
    for dim, (size, count) in enumerate(zip(kernel, grid, strict=True)):
        x = x.narrow(dim + 2, 0, size * count)  # a remainder that no patch covers
    split = [length for size, count in zip(kernel, grid, strict=True) for length in (count, size)]
    dims = len(kernel)
    x = x.reshape(rows, channels, *split)
    counts, sizes = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return x.permute(0, *counts, 1, *sizes).reshape(rows, math.prod(grid), -1)


def _plain(recorder: GramianRecorder, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return recorder.carries_samples(x) and recorder.batch_dim(x) == 0 and not recorder.is_foreign(weight, bias)


def _tuple(value: Sizes, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def convolution(
    recorder: GramianRecorder,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Any:
    """``torch.nn.functional.conv1d``, ``conv2d``, ``conv3d``."""
    dims = weight.dim() - 2
    if input.dim() != weight.dim() or not _plain(recorder, input, weight, bias):
        return NotImplemented
    x = recorder.autocast(input)
    dilation = _tuple(dilation, dims)
    if isinstance(padding, str):
        extra = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [e // 2 for e in extra]
        if any(e % 2 for e in extra):
            x = F.pad(x, [side for e in reversed(extra) for side in (0, e % 2)])
    geometry = (_tuple(stride, dims), _tuple(padding, dims), dilation, False, (0,) * dims, groups)
    output = func(x, weight.detach(), None if bias is None else bias.detach(), *geometry[:3], groups)
    return recorder.tap(output, ConvolutionOperation(x, recorder.operand(weight), recorder.operand(bias), geometry))


def transposed_convolution(
    recorder: GramianRecorder,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Any:
    """``torch.nn.functional.conv_transpose1d``, ``conv_transpose2d``, ``conv_transpose3d``."""
    dims = weight.dim() - 2
    if input.dim() != weight.dim() or not _plain(recorder, input, weight, bias):
        return NotImplemented
    x = recorder.autocast(input)
    sizes = [_tuple(value, dims) for value in (stride, padding, dilation, output_padding)]
    geometry = (sizes[0], sizes[1], sizes[2], True, sizes[3], groups)
    output = func(
        x, weight.detach(), None if bias is None else bias.detach(), sizes[0], sizes[1], sizes[3], groups, sizes[2]
    )
    return recorder.tap(output, ConvolutionOperation(x, recorder.operand(weight), recorder.operand(bias), geometry))
