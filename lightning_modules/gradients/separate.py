"""A recorded backward pass of its own, before training's: what the groups' gradients are decides what is trained on.

Multi-task optimisation needs the Gramian first and the training gradient second. There are two ways to the second:

- `kept`: keep all groups' gradients (G times the parameters) and combine them: no further pass.
- back-propagate another loss over the same graph, which `SeparateRecorder.measure` can leave standing: one further
  pass, and no memory beyond the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import _engine_run_backward

from lightning_modules.gradients.collectors import GramianCollector
from lightning_modules.gradients.coverage import gradient_norm
from lightning_modules.gradients.gramian import Gramian
from lightning_modules.gradients.recorder import GramianRecorder


class RowCollector(GramianCollector):
    """Keeps the gradients themselves, summed over the groups of a task, besides the inner products of the groups.

    Attributes:
        rows: For each parameter (K, n): the tasks' parts of the gradient of the loss that was back-propagated.
    """

    takes_products = False

    def __init__(self, parameters: Sequence[nn.Parameter], num_tasks: int, halves: int) -> None:
        super().__init__(len(parameters), num_tasks * halves, parameters[0].device)
        self._num_tasks = num_tasks
        self.rows = [p.new_zeros((num_tasks, p.numel()), dtype=_exact(p.dtype)) for p in parameters]

    def collect(self, index: int, start: int, rows: Tensor) -> None:
        """Adds a piece."""
        super().collect(index, start, rows)
        tasks = rows.view(self._num_tasks, -1, rows.shape[1]).sum(1) if len(rows) > self._num_tasks else rows
        self.rows[index][:, start : start + rows.shape[1]] += tasks


class SeparateRecorder(GramianRecorder):
    """A recorder whose backward pass (`measure`) leaves ``.grad`` as it is.

    Distributed training notices nothing of it either: only the engine's accumulation of gradients triggers DDP.
    """

    _norms: list[Tensor | None] | None = None

    def measure(self, loss: Tensor, *, keep_graph: bool) -> Gramian:
        """Back-propagates ``loss``, the mean over the batch, and returns the Gramian of the groups' mean losses.

        Args:
            loss: A number, from a forward pass under this recorder.
            keep_graph: Whether the graph may be used again: further backward passes then leave ordinary gradients,
                at the cost of ordinary passes.

        Raises:
            RuntimeError: If called outside of ``with recorder:``.
        """
        if GramianRecorder._active is not self:
            raise RuntimeError("measure works inside of `with recorder:` alone")
        self._in_backward = True
        try:
            # Backward passes run without autocast: products of gradients must not be rounded to half precision.
            with torch.autocast(loss.device.type, enabled=False):
                gradients = _engine_run_backward(
                    (loss,),
                    (torch.ones_like(loss),),
                    keep_graph,
                    False,
                    tuple(self._parameters),
                    allow_unreachable=True,
                    accumulate_grad=False,
                )
        finally:
            self._in_backward = False
        self._norms = [None if gradient is None else gradient_norm(gradient) for gradient in gradients]
        result = self.result()
        if keep_graph:
            self.ledger.release()
        return result

    def _gradient_norms(self) -> list[Tensor | None] | None:
        return self._norms


class GivenGradient(torch.autograd.Function):
    """A number whose gradients are given: training's backward pass hands them to the parameters, scaled as any others.

    So gradient scaling, accumulation, averaging over processes and clipping work as ever.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:  # noqa: ARG004
        """``value``, with one gradient for each of the parameters, in their shapes."""
        ctx.gradients = gradients
        return value.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The gradients, times that of the number."""
        return None, None, *(gradient * grad.to(gradient.dtype) for gradient in ctx.gradients)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
