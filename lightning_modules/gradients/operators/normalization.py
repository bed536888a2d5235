"""Scale and shift of layer, RMS, group and instance norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_modules.gradients.ledger import Ledger, Operand

if TYPE_CHECKING:
    from lightning_modules.gradients.recorder import GramianRecorder


class NormalizationOperation:
    """Splits the gradients of scale, sum of (output gradient) * (normalised input), and shift, sum of output gradient.

    The normalised input is computed anew in the backward pass instead of being kept: it would double the memory.

    Args:
        x: Input.
        scale: None if it is not trained.
        shift: None if there is none or it is not trained.
        normalize: The norm without scale and shift.
        trailing: How many trailing dimensions the parameters have; 0 if they belong to dimension 1, the channels.
        batch_dim: Dimension that runs over samples.
    """

    def __init__(
        self,
        x: Tensor,
        scale: Operand | None,
        shift: Operand | None,
        normalize: Callable[[Tensor], Tensor],
        trailing: int,
        batch_dim: int = 0,
    ) -> None:
        self.scale, self.shift = scale, shift
        self.operands = tuple(operand for operand in (scale, shift) if operand is not None)
        self.saved: tuple[Tensor, ...] = () if scale is None else (x,)
        self.normalize = normalize
        self.trailing = trailing
        self.batch_dim = batch_dim

    def split(self, ledger: Ledger, saved: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
        """See `Operation.split`."""
        grad = _full(grad)
        totals: list[Tensor | None] = []
        if self.scale is not None:
            (x,) = saved
            totals.append(ledger.deliver(self.scale, [(0, self._sum(ledger, grad * self.normalize(_full(x))))]))
        if self.shift is not None:
            totals.append(ledger.deliver(self.shift, [(0, self._sum(ledger, grad))]))
        return totals

    def _sum(self, ledger: Ledger, values: Tensor) -> Tensor:
        if self.trailing:
            if self.batch_dim:
                values = values.movedim(self.batch_dim, 0)
            return ledger.groups.sum(values.reshape(-1, math.prod(values.shape[-self.trailing :])))
        return ledger.groups.sum(values.flatten(2).sum(2) if values.dim() > 2 else values)


class GroupNormOperation:
    """Splits the gradients of a group norm's scale and shift by its own backward kernel, one group at a time.

    Args:
        x: Input (rows, channels, ...), ordered by group.
        scale: None if it is not trained.
        shift: None if it is not trained.
        statistics: Mean and reciprocal standard deviation of the forward pass, and the scale's values.
        sizes: Channels, positions, groups of channels.
    """

    def __init__(
        self,
        x: Tensor,
        scale: Operand | None,
        shift: Operand | None,
        statistics: tuple[Tensor, Tensor, Tensor],
        sizes: tuple[int, int, int],
    ) -> None:
        self.owners = (scale, shift)
        self.operands = tuple(operand for operand in self.owners if operand is not None)
        self.saved: tuple[Tensor, ...] = (x, *statistics)
        self.sizes = sizes

    def split(self, ledger: Ledger, saved: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
        """See `Operation.split`."""
        x, mean, rstd, weight = saved
        groups, folded = ledger.groups, len(x) // ledger.groups.size
        grad = grad.contiguous()
        rows = grad.new_zeros((2, groups.num_groups, self.sizes[0]))
        for index, members in groups.slices():
            part = slice(members.start * folded, members.stop * folded)
            _, rows[0, index], rows[1, index] = torch.ops.aten.native_group_norm_backward(
                grad[part],
                x[part],
                mean[part],
                rstd[part],
                weight,
                (members.stop - members.start) * folded,
                *self.sizes,
                [False, True, True],
            )
        return [ledger.deliver(operand, [(0, own)]) for operand, own in zip(self.owners, rows, strict=True) if operand]


def _full(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x


def layer_norm(
    recorder: GramianRecorder,
    func: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """``torch.nn.functional.layer_norm``."""
    if not _plain(recorder, input, input.dim() - len(normalized_shape), weight, bias):
        return NotImplemented
    output = func(input, normalized_shape, _detached(weight), _detached(bias), eps)
    operation = NormalizationOperation(
        input,
        recorder.operand(weight),
        recorder.operand(bias),
        lambda x: func(x, normalized_shape, None, None, eps),
        len(normalized_shape),
        recorder.batch_dim(input),
    )
    return recorder.tap(output, operation)


def rms_norm(
    recorder: GramianRecorder,
    func: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """``torch.nn.functional.rms_norm``."""
    if not _plain(recorder, input, input.dim() - len(normalized_shape), weight):
        return NotImplemented
    output = func(input, normalized_shape, _detached(weight), eps)
    operation = NormalizationOperation(
        input,
        recorder.operand(weight),
        None,
        lambda x: func(x, normalized_shape, None, eps),
        len(normalized_shape),
        recorder.batch_dim(input),
    )
    return recorder.tap(output, operation)


def group_norm(
    recorder: GramianRecorder,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """``torch.nn.functional.group_norm``."""
    if not _plain(recorder, input, 1, weight, bias):
        return NotImplemented
    scale, shift = recorder.operand(weight), recorder.operand(bias)
    fused = input.is_contiguous() and recorder.groups.ordered and not torch.is_autocast_enabled(input.device.type)
    if weight is not None and bias is not None and fused:
        rows, channels = input.shape[:2]
        sizes = (channels, input[0, 0].numel(), num_groups)
        output, mean, rstd = torch.native_group_norm(input, weight.detach(), bias.detach(), rows, *sizes, eps)
        statistics = (mean.detach(), rstd.detach(), weight.detach())
        return recorder.tap(output, GroupNormOperation(input, scale, shift, statistics, sizes))
    output = func(input, num_groups, _detached(weight), _detached(bias), eps)
    operation = NormalizationOperation(input, scale, shift, lambda x: func(x, num_groups, None, None, eps), 0)
    return recorder.tap(output, operation)


def instance_norm(
    recorder: GramianRecorder,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,  # noqa: ARG001  (there is none without a mean)
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """``torch.nn.functional.instance_norm``."""
    if running_mean is not None or not _plain(recorder, input, 1, weight, bias):
        return NotImplemented
    output = func(input, None, None, _detached(weight), _detached(bias), use_input_stats, momentum, eps)
    operation = NormalizationOperation(
        input,
        recorder.operand(weight),
        recorder.operand(bias),
        lambda x: func(x, None, None, None, None, use_input_stats, momentum, eps),
        0,
    )
    return recorder.tap(output, operation)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _plain(recorder: GramianRecorder, x: Tensor, leading: int, *parameters: Tensor | None) -> bool:
    """Whether samples lie along one of the ``leading`` dimensions of ``x``, and the parameters are the same for all."""
    return recorder.carries_samples(x) and 0 <= recorder.batch_dim(x) < leading and not recorder.is_foreign(*parameters)
