"""Whether a method's Gramian is right, how much memory its step needs, and how long it takes."""

from __future__ import annotations

import dataclasses
import gc
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from experiments.benchmarks.gramian.methods import Method, Plain, Setting, named_parameters
from experiments.benchmarks.gramian.workloads import Batch, Workload
from lightning_modules.gradients import gramian_by_subbatches

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest error allowed, relative to the largest entry of the Gramian and to the norm of the gradient."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """Gramian (K, K) and training gradient (P,) of a batch in float64."""

    gramian: Tensor
    gradient: Tensor


@dataclasses.dataclass
class Case:
    """A method at one K, and what was measured of it.

    Attributes:
        method: The method.
        batch: The batch, which fixes K.
        gramian_error: Largest error of the Gramian, relative to its largest entry; None for the plain step.
        gradient_error: Norm of the training gradient's error, relative to its norm.
        peak_bytes: Peak of live tensor memory during the step.
        trial: Seconds of the step in which all this was measured, to plan with.
        note: What to know about it.
        ratios: Seconds of a step over those of the plain steps before and after it, one per round.
        seconds: Seconds of a step, one per round.
    """

    method: Method
    batch: Batch
    gramian_error: float | None
    gradient_error: float
    peak_bytes: int
    trial: float
    note: str
    ratios: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


class UnusableMethodError(Exception):
    """A method fails, is wrong or needs too much memory here."""


def truth_of(workload: Workload, setting: Setting, num_groups: int) -> Truth:
    """Gramian by separate passes and gradient of the mean loss, in float64."""
    network = workload.network(setting.device, torch.float64)
    batch = workload.batch(num_groups, setting.device, torch.float64)

    def sample_loss(samples: Tensor) -> Tensor:
        return workload.losses(network, *(tensor[samples] for tensor in batch.tensors()))

    parameters = named_parameters(network)
    gramian = gramian_by_subbatches(sample_loss, parameters, batch.group, num_groups).total()
    gradients = torch.autograd.grad(workload.losses(network, *batch.tensors()).mean(), list(parameters.values()))
    return Truth(gramian, torch.cat([gradient.flatten() for gradient in gradients]))


def check(method: Method, batch: Batch, truth: Truth, available: float) -> Case:
    """Runs a method for the first time at this K: is it right, and how much memory does it take?

    Args:
        method: The method.
        batch: The batch.
        truth: What must come out.
        available: Bytes that may be used.

    Raises:
        UnusableMethodError: With the reason why the method cannot be measured.
    """
    parameter_bytes = sum(parameter.nbytes for parameter in method.parameters)
    needed = {"one": 1, "tasks": batch.num_groups, "samples": len(batch.t)}[method.holds] * parameter_bytes
    if needed > available:
        raise UnusableMethodError(
            f"memory: its gradients alone take {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"
        )
    try:
        if not method.optimizer.state or method.setting.compiled:
            method.step(batch)  # the optimiser's state comes into being with its first step, and compilation ends
        started = time.perf_counter()
        peak, gramian = step_and_peak(method, batch)
        seconds = time.perf_counter() - started
        gradient = torch.cat([_gradient(parameter) for parameter in method.parameters])
    except Exception as error:
        raise UnusableMethodError(f"fails: {type(error).__name__}: {_first_line(error)}") from error
    finally:
        method.optimizer.zero_grad(set_to_none=True)
    gradient_error = float((gradient.double() - truth.gradient).norm() / truth.gradient.norm())
    gramian_error = None
    if gramian is not None:
        gramian_error = float((gramian.double() - truth.gramian).abs().max() / truth.gramian.abs().max())
    for quantity, error_size in (("Gramian", gramian_error), ("gradient", gradient_error)):
        if error_size is not None and not error_size <= TOLERANCE[method.setting.precision]:
            raise UnusableMethodError(f"wrong: relative error of the {quantity} against float64 is {error_size:.1e}")
    return Case(method, batch, gramian_error, gradient_error, peak, seconds, method.note)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0][:200]


def step_and_peak(method: Method, batch: Batch) -> tuple[int, Tensor | None]:
    """One training step and its peak of live tensor memory: parameters, optimiser state and batch included.

    On CUDA what the allocator reports. On the CPU the running sum of all allocations and releases that torch's
    profiler records: it is exact, the same in every run, and free of what an allocator keeps for later. As a check
    it was compared once with the process's high-water mark (``VmHWM`` after ``clear_refs``, in a fresh process, with
    ``MALLOC_MMAP_THRESHOLD_=65536`` so that released memory leaves the process): 253.04 MiB of activations and
    gradients by the profiler, 253.53 MiB by the kernel, for the plain step of DiT-128.

    Args:
        method: A method that has made a step, with no gradients set. Left with the step's gradients in ``.grad``.
        batch: The batch.

    Returns:
        Peak in bytes, and the Gramian.
    """
    tensors = [*method.model.parameters(), *method.model.buffers()]
    states = [value for state in method.optimizer.state.values() for value in state.values()]
    tensors += [value for value in states if isinstance(value, Tensor)]
    resting = sum(tensor.nbytes for tensor in tensors) + batch.num_bytes()
    if method.setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gramian = method.update(batch)
        torch.cuda.synchronize()
        return resting + torch.cuda.max_memory_allocated() - before, gramian
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gramian = method.update(batch)
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return resting + peak, gramian


def free_bytes(setting: Setting) -> float:
    """Memory that a method may count on: nine tenths of what is free."""
    if setting.device == "cuda":
        return 0.9 * torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo")
    if not lines.exists():
        return float("inf")
    fields = dict(line.split(":") for line in lines.read_text().splitlines())
    return 0.9 * 1024 * int(fields["MemAvailable"].split()[0])


def seconds_per_step(method: Method, batch: Batch, repeats: int = 1) -> float:
    """Wall time of a step, the mean of ``repeats`` in a row."""
    if method.setting.device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        method.step(batch)
    if method.setting.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def run_round(plain: Plain, cases: list[Case], number: int, repeats: int) -> None:
    """Times every case once, in an order of this round's own, each between two plain steps.

    A ratio's denominator is the mean of the plain steps just before and just after: a machine that slows down or
    speeds up does so for both.
    """
    order = random.Random(number).sample(cases, len(cases))
    gc.collect()
    gc.disable()
    try:
        before = seconds_per_step(plain, cases[0].batch, repeats)
        for case in order:
            seconds = seconds_per_step(case.method, case.batch, repeats)
            gc.collect()
            after = seconds_per_step(plain, case.batch, repeats)
            case.ratios.append(2 * seconds / (before + after))
            case.seconds.append(seconds)
            before = after
    finally:
        gc.enable()
