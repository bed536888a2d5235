"""Others' ways to the Gramian: torchjd, torch.func and Opacus, each as its documentation says.

They are part of the ``dev`` extra; a method whose package is missing says so when it is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from experiments.benchmarks.gramian.methods import Method, Setting, named_parameters
from experiments.benchmarks.gramian.workloads import Batch, Workload


class AutoJac(Method):
    """torchjd's ``autojac``: K backward passes in parallel, by vmap over the K cotangents.

    The Gramian is what its own aggregation computes on the way to ``.grad`` (``optimize_gramian_computation``).
    """

    name = "autojac"
    variant = "vmapped"
    holds = "tasks"
    scope = "total"
    compiles = False
    parallel_chunk_size: int | None = None
    note = "torchjd.autojac.backward, then jac_to_grad(optimize_gramian_computation=True), which sums the tasks"

    def __init__(self, workload: Workload, setting: Setting) -> None:
        from torchjd.aggregation import GramianWeightedAggregator, Weighting

        class MeanOfTasks(Weighting):
            """Weights every task alike, and keeps the Gramian it is given."""

            def forward(self, stat: Tensor, /) -> Tensor:
                self.gramian = stat
                return stat.new_full((len(stat),), 1 / len(stat))

        super().__init__(workload, setting)
        self.weighting = MeanOfTasks()
        self.aggregator: Any = GramianWeightedAggregator(self.weighting)

    def backward(self, batch: Batch) -> Tensor:
        """Jacobian into ``.jac``, then Gramian and training gradient from it."""
        from torchjd.autojac import backward, jac_to_grad

        losses = batch.task_means(self.losses(*batch.tensors()))
        backward(losses, inputs=self.parameters, parallel_chunk_size=self.parallel_chunk_size)
        jac_to_grad(self.parameters, self.aggregator, optimize_gramian_computation=True)
        return self.weighting.gramian


class AutoJacLoop(AutoJac):
    """The same without vmap: one retained backward pass after the other."""

    variant = "one at a time"
    parallel_chunk_size = 1


class AutogramSamples(Method):
    """torchjd's ``autogram`` on the losses of all samples; the tasks' Gramian by averaging blocks of the B x B one."""

    name = "autogram"
    variant = "batch_dim=0, pooled"
    scope = "total"
    compiles = False
    batch_dim: Literal[0] | None = 0
    note = "torchjd.autogram.Engine gives no gradient: a second backward pass follows"

    def __init__(self, workload: Workload, setting: Setting) -> None:
        from torchjd.autogram import Engine

        super().__init__(workload, setting)
        self.engine = Engine(self.model, batch_dim=self.batch_dim)

    def backward(self, batch: Batch) -> Tensor:
        """The engine's backward pass, then the ordinary one."""
        losses = self.losses(*batch.tensors())
        gramian = self.engine.compute_gramian(losses)
        losses.mean().backward()
        size = len(losses) // batch.num_groups
        return gramian.view(batch.num_groups, size, batch.num_groups, size).mean((1, 3))


class AutogramTasks(AutogramSamples):
    """torchjd's ``autogram`` on the K tasks' losses: K cotangents through the whole batch, by vmap."""

    variant = "batch_dim=None"
    batch_dim = None

    def backward(self, batch: Batch) -> Tensor:
        """The engine's K backward passes, then the ordinary one."""
        losses = batch.task_means(self.losses(*batch.tensors()))
        gramian = self.engine.compute_gramian(losses)
        losses.mean().backward()
        return gramian


class VmapGradTasks(Method):
    """torch.func: vmap over tasks of the gradient of a task's mean loss."""

    name = "vmap_grad"
    variant = "per task"
    holds: ClassVar[Literal["one", "tasks", "samples"]] = "tasks"
    compiles = False
    note = "torch.func.vmap(grad) over tasks; K gradients are held; the training gradient is their mean"

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__(workload, setting)
        self.named = named_parameters(self.model)
        self.gradient = vmap(grad(self._loss), in_dims=(None, 0, 0, 0, 0))

    def _loss(self, parameters: dict[str, Tensor], *tensors: Tensor) -> Tensor:
        """Mean loss of a group of samples."""

        def network(*args: Tensor) -> Tensor:
            return functional_call(self.model, parameters, args)

        with self.setting.autocast():
            return self.workload.losses(network, *tensors).mean()

    def _gradients(self, batch: Batch, groups: int) -> list[Tensor]:
        """Gradients of the mean losses of ``groups`` equal parts of the batch, each (groups, *shape)."""
        detached = {name: parameter.detach() for name, parameter in self.named.items()}
        tensors = [tensor.unflatten(0, (groups, -1)) for tensor in batch.tensors()]
        return list(self.gradient(detached, *tensors).values())

    def backward(self, batch: Batch) -> Tensor:
        """The tasks' gradients in one call."""
        return self._keep(self._gradients(batch, batch.num_groups))


class VmapGradSamples(VmapGradTasks):
    """torch.func: vmap over samples, as its tutorial has it; the tasks' gradients are means over samples."""

    variant = "per sample"
    holds = "samples"
    note = "torch.func.vmap(grad) over samples; B gradients are held; the training gradient is their mean"

    def backward(self, batch: Batch) -> Tensor:
        """The samples' gradients in one call."""
        return self._keep(_pooled(self._gradients(batch, len(batch.t)), batch.num_groups))


class Opacus(Method):
    """Opacus' per-sample gradients by hooks (``GradSampleModule``); the tasks' gradients are means over samples."""

    name = "opacus"
    variant = "hooks"
    functorch: ClassVar[bool] = False
    compiles = False
    holds = "samples"
    note = "opacus.GradSampleModule; B gradients are held; the training gradient is the step's own"

    def __init__(self, workload: Workload, setting: Setting) -> None:
        from opacus import GradSampleModule

        super().__init__(workload, setting)
        self.wrapped = GradSampleModule(self.model, loss_reduction="mean", force_functorch=self.functorch)
        self.network = self.wrapped

    def backward(self, batch: Batch) -> Tensor:
        """One forward and backward pass with Opacus' hooks."""
        self.losses(*batch.tensors()).mean().backward()
        gramians = []
        for parameter in self.parameters:
            samples: Any = parameter
            (rows,) = _pooled([samples.grad_sample], batch.num_groups)
            samples.grad_sample = None
            gramians.append(rows.flatten(1) @ rows.flatten(1).T)
        return torch.stack(gramians).sum(0)


class OpacusFunctorch(Opacus):
    """The same with torch.func in place of its own formulas.

    Opacus 1.6 unfolds a convolution's input by strides that hold for contiguous inputs only
    (``opacus.utils.tensor_utils.unfold2d``), so its own formula is wrong where activations are laid out otherwise, as
    they are behind the attention of diffusers' U-Nets, of which ours is made.
    """

    variant = "force_functorch"
    functorch = True


def _pooled(gradients: Sequence[Tensor], num_groups: int) -> list[Tensor]:
    """Per-sample gradients (B, *shape), ordered by task -> means per task (K, *shape)."""
    return [tensor.unflatten(0, (num_groups, -1)).mean(1) for tensor in gradients]
