"""The plain training step, and ways to the Gramian that need nothing but torch and us.

Every method leaves the training gradient (that of the batch's mean loss) in ``.grad``, so that the same optimiser step
can follow. Where a method does not yield that gradient on the way, it pays for what it takes to get it.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from experiments.benchmarks.gramian.workloads import Batch, Network, Workload
from lightning_modules.gradients import GramianRecorder, split_tasks


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and how all methods run.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: Of the forward pass under autocast; weights, gradients and optimiser are float32 in either case.
        compiled: Whether methods that can run on compiled models do.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    compiled: bool = False

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


class Method(abc.ABC):
    """One way to a training step that also gives the Gramian of the K tasks' gradients.

    Attributes:
        name: As in the output.
        variant: Which of several ways of the same name.
        scope: ``layers`` if every layer's Gramian is at hand, ``total`` if only the sum over the model.
        compiles: Whether it can run on a compiled model.
        holds: How many gradients of the whole model it holds at once: one, K or B.
        note: What a reader of its numbers should know.
        coverage: Share of the parameters that the last Gramian is exact for, where the method says so.
    """

    name: ClassVar[str]
    variant: ClassVar[str] = ""
    scope: ClassVar[Literal["layers", "total"]] = "layers"
    compiles: ClassVar[bool] = True
    holds: ClassVar[Literal["one", "tasks", "samples"]] = "one"
    note: ClassVar[str] = ""
    coverage: float | None = None

    def __init__(self, workload: Workload, setting: Setting) -> None:
        self.workload = workload
        self.setting = setting
        self.model = workload.network(setting.device)
        self.network: Network = torch.compile(self.model) if setting.compiled and self.compiles else self.model
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # With a learning rate of 0 a step costs the same and all methods stay at the same weights.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0)

    @abc.abstractmethod
    def backward(self, batch: Batch) -> Tensor | None:
        """Leaves the gradient of the batch's mean loss in ``.grad``; returns the Gramian (K, K), not weighted."""

    def update(self, batch: Batch) -> Tensor | None:
        """As `backward`, then the optimiser's step."""
        gramian = self.backward(batch)
        self.optimizer.step()
        return gramian

    def step(self, batch: Batch) -> None:
        """The whole training step, gradients cleared."""
        self.update(batch)
        self.optimizer.zero_grad(set_to_none=True)

    def losses(self, *tensors: Tensor) -> Tensor:
        """Losses (n,) of the samples given by x, t, y, noise."""
        with self.setting.autocast():
            return self.workload.losses(self.network, *tensors)

    def _keep(self, gradients: Iterable[Tensor]) -> Tensor:
        """Gramian (K, K) of the tasks' gradients, and their mean into ``.grad``: the tasks have equally many samples.

        Args:
            gradients: For each parameter, its K gradients (K, *shape).
        """
        gramians = []
        for parameter, rows in zip(self.parameters, gradients, strict=True):
            gramians.append(rows.flatten(1) @ rows.flatten(1).T)
            parameter.grad = rows.mean(0)
        return torch.stack(gramians).sum(0)


class Plain(Method):
    """Forward, backward, AdamW step: no Gramian."""

    name = "plain"
    note = "control: the plain step, timed like every other method against its neighbouring plain steps"

    def backward(self, batch: Batch) -> None:
        """The training gradient only."""
        self.losses(*batch.tensors()).mean().backward()


class Ours(Method):
    """The training step under `GramianRecorder`."""

    name = "ours"
    halves: ClassVar[int] = 1
    note = "every layer's Gramian; the training gradient is the step's own"

    def backward(self, batch: Batch) -> Tensor:
        """One forward and one backward pass."""
        group = batch.group if self.halves == 1 else split_tasks(batch.group, batch.num_groups, self.halves)
        recorder = GramianRecorder(self.model, group, batch.num_groups * self.halves)
        with recorder:
            self.losses(*batch.tensors()).mean().backward()
        gramian = recorder.result()
        self.coverage = gramian.coverage
        values = gramian.total()
        # The gradient of a task is the mean of its halves', which have equally many samples.
        return values.view(batch.num_groups, self.halves, batch.num_groups, self.halves).mean((1, 3))


class OursHalves(Ours):
    """The same, every task split into two independent halves, as the noise-corrected statistics need."""

    name = "ours_halves"
    halves = 2
    note = "2K groups; every layer's Gramian; the training gradient is the step's own"


class Subbatches(Method):
    """K forward and backward passes, each over one task's samples."""

    name = "subbatches"
    holds = "tasks"
    note = "K gradients of the whole model are held; the training gradient is their mean"

    def backward(self, batch: Batch) -> Tensor:
        """Per task: forward and backward pass."""
        gradients = [torch.autograd.grad(self.losses(*part).mean(), self.parameters) for part in batch.parts()]
        return self._keep(_by_parameter(gradients))


class Retained(Method):
    """One forward pass, K backward passes over its retained graph: LibMTL, PCGrad, Nash-MTL, ANT."""

    name = "retained"
    holds = "tasks"
    compiles = False  # a compiled graph gives its buffers away in its first backward pass (donated buffers)
    note = "K gradients of the whole model are held; the training gradient is their mean"

    def backward(self, batch: Batch) -> Tensor:
        """Per task: a backward pass over the whole batch's graph."""
        losses = batch.task_means(self.losses(*batch.tensors())).unbind()
        gradients = [
            torch.autograd.grad(loss, self.parameters, retain_graph=index + 1 < len(losses))
            for index, loss in enumerate(losses)
        ]
        return self._keep(_by_parameter(gradients))


def _by_parameter(gradients: list[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """For each task its gradients by parameter -> for each parameter its gradients (K, *shape), made when asked for."""
    return (torch.stack(column) for column in zip(*gradients, strict=True))


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
