"""The exact Gramian of every layer from the one backward pass that training does anyway.

For a weight W a training step computes the sum over samples of (output gradient)(input)'. Taken group by group this sum
gives each group's exact gradient in the same arithmetic; only inner products between the groups are kept, and the parts
are added up for the optimizer. So there are no further backward passes, and no K copies of the parameters.

`GramianRecorder` watches the operators that a model calls (`torch.overrides.TorchFunctionMode`): no hooks, no patched
modules, and any model's code as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_modules.gradients.backward import BACKWARD, run_backward
from lightning_modules.gradients.collectors import Collector, GramianCollector
from lightning_modules.gradients.coverage import accumulated_norms, refuse_batch_statistics, uncovered_parameters
from lightning_modules.gradients.gramian import Gramian, layered_gramian, trained_parameters
from lightning_modules.gradients.groups import Groups, mean_factors
from lightning_modules.gradients.layout import ELEMENTWISE, LOST, Call, keeps_samples, tensors_in
from lightning_modules.gradients.ledger import Ledger, Operand
from lightning_modules.gradients.operators import HANDLERS
from lightning_modules.gradients.operators.general import elementwise, general
from lightning_modules.gradients.processes import ProcessAverage
from lightning_modules.gradients.provenance import Mark, Provenance
from lightning_modules.gradients.tap import Operation, Tap, Unseen


class GramianRecorder(TorchFunctionMode):
    """Records the inner products between groups' gradients during one forward and backward pass.

    ::

        recorder = GramianRecorder(model, group, num_groups)
        with recorder:
            loss = loss_per_sample(model(x)).mean()
            loss.backward()
        gramian = recorder.result()

    ``.grad`` is what it would be without, up to the order in which floating-point numbers are added. Samples must lie
    along dimension 0 of the model's inputs (m consecutive rows for each are allowed), and must not influence one
    another: `verification` tests it. A batch norm in training mode is refused. Prepare data before entering: samples
    that are picked or put in another order inside are no longer known.

    Args:
        model: Its trainable parameters are measured.
        group: Group of each sample (B,), in any order and of any sizes; a batch ordered by group, with groups of equal
            size, is cheapest.
        num_groups: G. Groups may be empty.
        reduction: Whether the loss that is back-propagated is the mean or the sum over the batch.
        scale: Further factors (G,) that turn a group's part of that loss into its mean loss, such as 1 / s under a
            gradient scaler with scale s.
        processes: With several processes, ``"global"`` gives the Gramian of the gradients averaged over processes (one
            all-reduce of all groups' gradients: G times the traffic of plain training, in this step); ``"local"``
            leaves each process its own Gramian, over its own samples, at no traffic.
        retain: Makes several forward and backward passes one measurement (gradient accumulation), by keeping all
            groups' gradients, G times the parameters, until `result`. Call `regroup` before each further pass; with
            a mean, passes must have equally many samples, and each loss be divided by the number of passes.
        collector: Takes the gradients in place of inner products; `result` is not available then.

    Raises:
        ValueError: If ``group`` is malformed, or the model has nothing to train.
        RuntimeError: On entering, if another recorder is active; with ``retain``, in a backward pass not announced.
    """

    _active: ClassVar[GramianRecorder | None] = None

    def __init__(
        self,
        model: nn.Module,
        group: Tensor,
        num_groups: int,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        scale: Tensor | None = None,
        processes: Literal["global", "local"] = "global",
        retain: bool = False,
        collector: Collector | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if processes not in ("global", "local"):
            raise ValueError(f"processes must be 'global' or 'local', got {processes!r}")
        if scale is not None and (not isinstance(scale, Tensor) or scale.shape != (num_groups,)):
            raise ValueError(f"scale must be a tensor of one factor for each of {num_groups} groups, got {scale!r}")
        trained = trained_parameters(model)
        if not trained:
            raise ValueError("the model has no parameter that requires a gradient, so there is nothing to measure")
        self.names = tuple(trained)
        self.groups = Groups(group, num_groups)
        self._parameters = list(trained.values())
        constants = (*model.buffers(), *model.parameters())
        self._provenance = Provenance(self._parameters, constants, self.groups.size)
        self._reduction = reduction
        self._scale = scale
        several = processes == "global" and dist.is_initialized() and dist.get_world_size() > 1
        self._average = ProcessAverage(self.groups.counts, reduction == "mean") if several else None
        self._collector: Collector = collector or GramianCollector(len(trained), num_groups, group.device)
        self.ledger = Ledger(self._parameters, self.groups, self._collector, retain, self._average)
        self._counts = self.groups.counts.clone()
        self._in_backward = False
        self._grouped = True  # whether the next backward pass is of samples whose groups are known
        self._retain = retain
        self._finished = False
        self._result: Gramian | None = None
        self._before: list[Tensor | None] | None = None  # gradients before the first backward pass
        self._half = False
        self._eager = contextlib.ExitStack()

    def __enter__(self) -> GramianRecorder:
        """Starts recording. Compiled models run eagerly meanwhile: their operators cannot be seen."""
        if not self._in_backward:
            if GramianRecorder._active is not None:
                raise RuntimeError("another GramianRecorder is active, and only one can record at a time")
            GramianRecorder._active = self
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stops recording."""
        super().__exit__(*exception)
        if not self._in_backward:
            GramianRecorder._active = None
            self._eager.close()

    def regroup(self, group: Tensor) -> None:
        """Sets the groups of the next pass's samples; only with ``retain``.

        Raises:
            ValueError: If ``group`` is malformed.
        """
        self.groups = self.ledger.groups = Groups(group, self.groups.num_groups)
        self._grouped = True
        self._provenance.batch_size = self.groups.size
        self._counts += self.groups.counts

    def finish(self) -> None:
        """Ends the measurement: hands what is left to the collector, and the factors that scale it."""
        if self._finished:
            return
        self._finished = True
        self.ledger.settle()
        if self._average is not None:
            dist.all_reduce(self._counts)
        world = 1 if self._average is None else self._average.world
        factors = mean_factors(self._counts, 0 if self._reduction == "mean" else world)
        self._collector.finish(factors if self._scale is None else factors * self._scale)

    def result(self) -> Gramian:
        """The Gramian of every layer, once the backward pass is done and before gradients are reset.

        Raises:
            TypeError: If another collector took the gradients.
        """
        if self._result is not None:
            return self._result
        if not isinstance(self._collector, GramianCollector):
            raise TypeError(f"the gradients went to a {type(self._collector).__name__}: ask it for the result")
        self.ledger.settle()
        uncovered = uncovered_parameters(
            self._parameters, self.ledger, self._collector.values, self._gradient_norms(), self._half
        )
        self.finish()
        named = dict(zip(self.names, self._parameters, strict=True))
        self._result = layered_gramian(named, self._collector.values, self._counts, uncovered)
        return self._result

    def _gradient_norms(self) -> list[Tensor | None] | None:
        return None if self._before is None else accumulated_norms(self._parameters, self._before)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Sees every call of an operator in between; splits those where a trained parameter meets the batch."""
        kwargs = kwargs or {}
        if func in BACKWARD:
            return self._run_backward(func, args, kwargs)
        tensors = tensors_in(args, kwargs)
        marks = [self._provenance.of(tensor) for tensor in tensors]
        if func is nn.functional.batch_norm:
            refuse_batch_statistics(args, kwargs)
        params = {index for mark in marks if mark is not None for index in mark.params}
        if params and any(self.carries_samples(tensor) for tensor in tensors):
            return self._meet(func, args, kwargs, tensors)
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if tensors and not any(marks) and keeps_samples(name, tensors, output):
            return output  # the usual call, quickly: activations in, activations out
        if any(self.carries_samples(tensor) for tensor in tensors):
            return self._follow(Call(name, args, kwargs), tensors, output)
        self._provenance.mark_constant(func, tensors, output, params)
        return output

    def _meet(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: list[Tensor]) -> Any:
        """Runs an operator in which parameters meet the batch."""
        if not torch.is_grad_enabled():  # the first forward pass of reentrant checkpointing, which will come again
            for tensor in tensors:
                mark = self._provenance.of(tensor)
                self.expect(() if mark is None else mark.params, certain=False)
            return func(*args, **kwargs)
        if torch._C._are_functorch_transforms_active():  # the batch is hidden inside of vmap's tensors
            self.ledger.uncover_all()
            return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        output = NotImplemented if handler is None else handler(self, func, *args, **kwargs)
        if output is NotImplemented and func.__name__ in ELEMENTWISE:
            output = elementwise(self, func, args, kwargs)
        if output is NotImplemented:
            output = general(self, func, args, kwargs)
        return self._follow(Call(func.__name__, args, kwargs), tensors, output)

    def _follow(self, call: Call, tensors: list[Tensor], output: Any) -> Any:
        """Keeps track of the samples. A gradient that comes back from where they were lost makes nothing certain."""
        if call.name == "__setitem__" and any(t.requires_grad and self.carries_samples(t) for t in tensors[1:]):
            self.ledger.uncover_all()
        if not self._provenance.follow_batch(call, tensors, output):
            return output
        if type(output) not in (Tensor, list, tuple) or any(output is tensor for tensor in tensors):
            self.ledger.uncover_all()
            return output
        return self._guarded(output)

    def _guarded(self, output: Any) -> Any:
        if isinstance(output, list | tuple):
            return type(output)(self._guarded(part) for part in output)
        if not isinstance(output, Tensor) or self.batch_dim(output) != LOST:
            return output
        if output.requires_grad and torch.is_grad_enabled():
            output = Unseen.apply(output, range(len(self._parameters)), self.ledger)
            self._provenance.mark(output, Mark((), False, LOST))
        return output

    def operand(self, tensor: Tensor | None) -> Operand | None:
        """What ``tensor`` stands for, if trained parameters are behind it."""
        mark = None if tensor is None or not tensor.requires_grad else self._provenance.of(tensor)
        if mark is None or tensor is None or not mark.params:
            return None
        return Operand(tensor, mark.params, tensor is self._parameters[mark.params[0]])

    def is_foreign(self, *tensors: Tensor | None) -> bool:
        """Whether one of an operator's parameters depends on samples, as in a hypernetwork: it must not be detached."""
        return any(t is not None and t.requires_grad and self.operand(t) is None for t in tensors)

    def batch_dim(self, tensor: Tensor) -> int:
        """The dimension of ``tensor`` that runs over samples."""
        return self._provenance.batch_dim(tensor)

    def carries_samples(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` differs between samples."""
        return self._provenance.carries_samples(tensor)

    def lose(self, outputs: Any, params: set[int]) -> Any:
        """``outputs`` of an operator that could not be split: its parameters and what follows are uncovered."""
        self.ledger.uncovered.update(params)
        self._provenance.mark_outputs(outputs, Mark((), False, LOST))
        return self._guarded(outputs)

    def autocast(self, x: Tensor) -> Tensor:
        """``x`` in the precision that autocast would give it, so that it is kept once, not in two precisions."""
        device = x.device.type
        if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
            return x
        self._half = True
        return x.to(torch.get_autocast_dtype(device))

    def tap(self, output: Tensor, operation: Operation) -> Tensor:
        """``output``, with the operation's gradients split when the backward pass arrives there."""
        self.expect(index for operand in operation.operands for index in operand.params)
        tensors = (*operation.saved, *(operand.tensor for operand in operation.operands))
        return Tap.apply(output, operation, self.ledger, *tensors)

    def expect(self, params: Iterable[int], certain: bool = True) -> None:
        """Announces a use of parameters; forward passes repeated during the backward pass are none."""
        if not self._in_backward:
            self.ledger.expect(params, certain)

    def _run_backward(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The backward pass, under this mode: checkpointing runs parts of the forward pass again in it."""
        if self._before is None:
            self._before = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        if not self._in_backward:
            if self._retain and not self._grouped:
                raise RuntimeError("a further backward pass, of samples whose groups are not known: call regroup first")
            self._grouped = False
        outer, self._in_backward = self._in_backward, True
        try:
            with self:
                run_backward(func, args, kwargs)
        finally:
            self._in_backward = outer
