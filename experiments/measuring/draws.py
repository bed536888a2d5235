"""The samples that a measurement trains on and the ones it evaluates on, all functions of the seed and a number."""

from __future__ import annotations

import argparse
import dataclasses

import torch
from torch import Tensor
from torch.utils.data import Subset

from experiments.probing.data import Batches, ProbeData, find_data
from experiments.probing.intervals import noised
from experiments.probing.subject import Subject
from lightning_modules.denoiser import NoisedBatch
from lightning_modules.errors import UserInputError
from lightning_modules.seeding import seeded_generator
from lightning_modules.timesteps import TimestepIntervals

_SPLIT_STREAM = 12
_HELD_OUT_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Draws:
    """Batches of one network.

    Attributes:
        subject: The network.
        data: Its images.
        intervals: The tasks.
        held_out: Whether the images evaluated on are unknown to the network, rather than just kept apart here.
    """

    subject: Subject
    data: ProbeData
    intervals: TimestepIntervals
    held_out: bool
    _training: Batches
    _evaluation: Batches

    @classmethod
    def of(cls, args: argparse.Namespace, subject: Subject, intervals: TimestepIntervals) -> Draws:
        """From the options; images to evaluate on are those that training held out, else a fixed fifth of the data.

        Raises:
            UserInputError: If there are no data, or too few.
        """
        data = find_data(args, subject)
        training, evaluation = data.dataset, data.held_out
        if evaluation is None:
            order = torch.randperm(len(data), generator=seeded_generator(args.seed, _SPLIT_STREAM)).tolist()
            kept = max(1, round(_HELD_OUT_SHARE * len(data)))
            training, evaluation = Subset(data.dataset, order[kept:]), Subset(data.dataset, order[:kept])
        if args.batch_size < intervals.num_intervals:
            raise UserInputError(
                f"--batch-size {args.batch_size} cannot give a sample to each of {intervals.num_intervals} intervals"
            )
        batches = [
            Batches(subject, dataclasses.replace(data, dataset=part, held_out=None), args.batch_size, args.seed + place)
            for place, part in enumerate((training, evaluation))
        ]
        return cls(subject, data, intervals, data.held_out is not None, batches[0], batches[1])

    def stratified(self, number: int, *, evaluation: bool = False) -> NoisedBatch:
        """Batch ``number`` (from 1) with samples of every task."""
        x, y, generator = (self._evaluation if evaluation else self._training).images(number)
        t = self.intervals.sample_stratified(len(x), generator)
        return noised(self.subject, x, y, t, generator)

    def within(self, task: int, number: int) -> NoisedBatch:
        """Batch ``number`` of training images with all timesteps from one task."""
        x, y, generator = self._training.images(number)
        return noised(self.subject, x, y, self.intervals.sample_within(task, len(x), generator), generator)

    def clean(self, number: int) -> tuple[Tensor, Tensor | None, torch.Generator]:
        """Batch ``number`` of training images and their labels on the device, and the generator of what is drawn."""
        x, y, generator = self._training.images(number, drop_labels=False)
        device = self.subject.module.device
        return x.to(device), None if y is None else y.to(device), generator
