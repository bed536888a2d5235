"""The Gramians of timestep intervals, batch by batch: what `dtr-lab probe` measures by default."""

from __future__ import annotations

import argparse
import math

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from analysis import conflict
from analysis.gramians import gramian_arrays
from experiments.probing.data import Batches
from experiments.probing.subject import Subject
from experiments.probing.verification import (
    contradicted_layers,
    errors_by_subbatches,
    expected_gradient,
    wrong_layers,
)
from lightning_modules.config import IntervalConfig
from lightning_modules.denoiser import NoisedBatch
from lightning_modules.errors import UserInputError
from lightning_modules.gradients import Gramian, GramianRecorder, split_tasks
from lightning_modules.gradients.collectors import Collector
from lightning_modules.gradients.gramian import trained_parameters
from lightning_modules.gradients.verification import without_layers
from lightning_modules.timesteps import TimestepIntervals

CHECK_EVERY = 4
"""The precision is looked at after every n-th batch: a rule of the batch number, so that results are repeatable."""

FloatArray = npt.NDArray[np.float64]


def build_intervals(args: argparse.Namespace, subject: Subject) -> TimestepIntervals:
    """The intervals that the options name, by default those of the checkpoint.

    Raises:
        UserInputError: If the options contradict each other, or a batch cannot give every half of an interval a sample.
    """
    trained = subject.module.interval_config
    if args.bounds is not None and (args.intervals is not None or args.spacing is not None):
        raise UserInputError("--bounds already says which intervals: leave out --intervals and --spacing")
    if args.bounds is None and args.intervals is None and args.spacing is None:
        intervals = subject.module.intervals
    else:
        intervals = IntervalConfig(
            num_intervals=args.intervals or trained.num_intervals,
            spacing=args.spacing or "uniform",
            bounds=args.bounds,
        ).build(subject.module.diffusion.log_snr)
    groups = intervals.num_intervals * args.halves
    if args.batch_size < groups:
        raise UserInputError(
            f"--batch-size {args.batch_size} cannot give a sample to each of {intervals.num_intervals} intervals in "
            f"{args.halves} halves: raise it to at least {groups}, better several times that"
        )
    return intervals


class IntervalProbe:
    """Measures one Gramian a batch.

    Attributes:
        intervals: The tasks.
        halves: Independent halves of each task's samples.
        layers: Names of the layers, once there is a batch.
        coverage: Share of the parameters for which the Gramians are exact, the least of all batches.
        uncovered: Names of the parameters for which the Gramian of some batch is not exact.
        wrong: Layers that verification found wrong.
        totals: The Gramian (G, G) over all layers of each batch.
        counts: Samples (G,) of each batch.
        losses: Mean losses (G,) of each batch.
    """

    def __init__(self, subject: Subject, batches: Batches, intervals: TimestepIntervals, halves: int) -> None:
        self.subject = subject
        self.batches = batches
        self.intervals = intervals
        self.halves = halves
        self.layers: tuple[str, ...] = ()
        self.coverage = 1.0
        self.uncovered: tuple[str, ...] = ()
        self.wrong: set[str] = set()
        self.totals: list[FloatArray] = []
        self.counts: list[npt.NDArray[np.int64]] = []
        self.losses: list[FloatArray] = []

    @property
    def num_groups(self) -> int:
        """G."""
        return self.intervals.num_intervals * self.halves

    def measure(self, number: int) -> Gramian:
        """Measures batch ``number`` and keeps its sum over layers; the first batch measured is verified."""
        batch, group = self.draw(number)
        first = not self.totals
        expected = expected_gradient(self.subject, batch, group, self.num_groups) if first else None
        recorder, losses = backward(self.subject, batch, group, self.num_groups)
        gramian = recorder.result()
        clear_gradients(self.subject)
        if expected is not None:
            self.wrong |= contradicted_layers(self.subject, gramian, expected)
        if self.wrong:
            gramian = without_layers(gramian, self.wrong, trained_parameters(self.subject.backbone))
        self.layers, self.coverage = gramian.layers, min(self.coverage, gramian.coverage)
        self.uncovered = tuple(dict.fromkeys((*self.uncovered, *gramian.uncovered)))
        self.totals.append(gramian.total().cpu().numpy())
        self.counts.append(gramian.counts.cpu().numpy())
        self.losses.append(group_means(losses, group, gramian.counts))
        return gramian

    def draw(self, number: int) -> tuple[NoisedBatch, Tensor]:
        """Batch ``number`` on the device, its timesteps stratified over the intervals, and its groups (B,)."""
        x, y, generator = self.batches.images(number)
        t = self.intervals.sample_stratified(len(x), generator)
        group = split_tasks(self.intervals.task_of(t), self.intervals.num_intervals, self.halves)
        return noised(self.subject, x, y, t, generator), group.to(self.subject.module.device)

    def dataset(self) -> xr.Dataset:
        """The batches so far as `analysis` reads them, with the layers summed."""
        return gramian_arrays(
            np.stack(self.totals)[:, None],
            np.stack(self.counts),
            layers=["total"],
            halves=self.halves,
            bounds=self.intervals.bounds,
            losses=np.stack(self.losses),
            steps=range(1, len(self.totals) + 1),
            log_snr=self.subject.module.diffusion.log_snr.tolist(),
        )

    def precision(self) -> float:
        """Largest standard error of all corrected cosines that are defined; infinite while fewer than half of them are.

        With few batches a cosine may pass for defined by chance, and a single one is no measurement of the matrix.
        """
        if not self.totals:
            return math.inf
        data = self.dataset()
        found = conflict.corrected_cosine(data["gramian"].isel(layer=0), data["group_count"])
        error = found["standard_error"].values
        above = error[np.triu_indices(len(error), 1)]
        defined = np.isfinite(above)
        return float(above[defined].max()) if 2 * defined.sum() >= max(len(above), 1) else math.inf

    def verify(self) -> tuple[dict[str, float], set[str]]:
        """The first batch once more, by a backward pass per group: every layer's relative error, and the wrong layers.

        Wrong layers count as uncovered from then on.
        """
        batch, group = self.draw(1)
        recorder, _ = backward(self.subject, batch, group, self.num_groups)
        gramian = recorder.result()
        clear_gradients(self.subject)
        errors = errors_by_subbatches(self.subject, batch, group, self.num_groups, gramian)
        wrong = wrong_layers(self.subject, gramian, errors)
        self.wrong |= wrong
        return errors, wrong


def noised(subject: Subject, x: Tensor, y: Tensor | None, t: Tensor, generator: torch.Generator) -> NoisedBatch:
    """A batch on the device, with noise drawn on the CPU."""
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    device = subject.module.device
    return NoisedBatch(x.to(device), None if y is None else y.to(device), t.to(device), noise.to(device))


def backward(
    subject: Subject, batch: NoisedBatch, group: Tensor, num_groups: int, collector: Collector | None = None
) -> tuple[GramianRecorder, Tensor]:
    """One recorded forward and backward pass of the training loss: the recorder, and the losses per sample (B,)."""
    recorder = GramianRecorder(subject.backbone, group, num_groups, reduction="mean", collector=collector)
    with recorder:
        losses = subject.module.sample_losses(batch, subject.backbone).loss
        losses.mean().backward()
    return recorder, losses.detach()


def clear_gradients(subject: Subject) -> None:
    """Drops the gradients that a backward pass leaves."""
    subject.backbone.zero_grad(set_to_none=True)


def group_means(losses: Tensor, group: Tensor, counts: Tensor) -> FloatArray:
    """Mean loss of each group (G,), NaN for empty ones, from losses per sample (B,)."""
    sums = np.bincount(group.cpu().numpy(), losses.double().cpu().numpy(), len(counts))
    number = counts.cpu().numpy()
    with np.errstate(invalid="ignore"):
        return sums / number
