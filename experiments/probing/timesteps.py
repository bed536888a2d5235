"""Affinity between single timesteps in bounded memory: what `dtr-lab probe --timesteps` measures.

For T = 1,000 and D = 8,192 the sketches of both halves take 66 MB, whatever the network. A batch of 64 timesteps adds
64 gradients of the largest layer while it is measured: 0.2 GB for DiT-S/2, 2 GB for DiT-XL/2. All gradients at once, as
ANT's script keeps them, would be 132 GB and 2.7 TB. The work is that of training on the images seen, each of
6 x 6.06 GFLOP (S/2) or 6 x 118.6 GFLOP (XL/2), so 0.3 or 5.7 PFLOP for 8 passes of one image a timestep, and a
multiply-add per parameter and timestep for the sketch, below 1 % of that.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from analysis.timestep_affinity import timestep_affinity
from experiments.probing.data import Batches
from experiments.probing.intervals import backward, clear_gradients, noised
from experiments.probing.subject import Subject
from experiments.probing.verification import contradicted_layers, expected_gradient
from lightning_modules.denoiser import NoisedBatch
from lightning_modules.errors import UserInputError
from lightning_modules.gradients.gramian import trained_parameters
from lightning_modules.gradients.sketch import CountSketch, Projection, SketchCollector, SketchSums, Unprojected
from lightning_modules.gradients.verification import without_layers
from lightning_modules.seeding import seeded_generator

HALVES = 2
_ORDER_STREAM = 12
_EXACT_BYTES = 8_000_000_000
"""`--check-exact` keeps all gradients; it is for small models."""
_CHECKED_FRACTIONS = (64, 16, 4, 1)


def choose_timesteps(args: argparse.Namespace, subject: Subject) -> Tensor:
    """The timesteps asked for: all T of the diffusion, or fewer at even distances from the first to the last.

    Raises:
        UserInputError: If there are too many or too few, or options for intervals are given too.
    """
    total = subject.module.diffusion.num_timesteps
    if not 2 <= args.timesteps <= total:
        raise UserInputError(f"--timesteps must lie in 2..{total}, this diffusion's T; got {args.timesteps}")
    if args.intervals is not None or args.spacing is not None or args.bounds is not None:
        raise UserInputError("--timesteps measures single timesteps: leave out --intervals, --spacing and --bounds")
    if args.halves != HALVES:
        raise UserInputError("--timesteps works with two halves: leave out --halves")
    if args.samples < 1 or args.batch_size % args.samples:
        raise UserInputError(f"--samples {args.samples} must divide --batch-size {args.batch_size}")
    return torch.linspace(0, total - 1, args.timesteps, dtype=torch.float64).round().long()


def batches_needed(args: argparse.Namespace, passes: int) -> int:
    """Batches in which every timestep occurs so many times."""
    return -(-passes * args.timesteps // (args.batch_size // args.samples))


class TimestepProbe:
    """Sketches of the gradients of single timesteps, in two halves.

    A batch holds the next few timesteps of an endless series of passes, each over all timesteps in a random order;
    passes belong to the two halves in turn. So only a batch's timesteps are groups at a time, all are visited equally
    often, and the halves have no batch in common.

    Attributes:
        timesteps: The timesteps (T,).
        sums: The sketches so far.

    Args:
        subject: The network.
        batches: Its images.
        timesteps: What to measure, (T,).
        samples: Samples of a timestep at each visit.
        projection: What to keep of the gradients.
        seed: Seed of the order of the timesteps.
    """

    def __init__(
        self,
        subject: Subject,
        batches: Batches,
        timesteps: Tensor,
        samples: int,
        projection: Projection,
        seed: int,
    ) -> None:
        self.subject = subject
        self.batches = batches
        self.timesteps = timesteps
        self.samples = samples
        self.projection = projection
        self.seed = seed
        self.sums = SketchSums(HALVES, len(timesteps), projection.width, subject.module.device)

    @property
    def groups(self) -> int:
        """Timesteps in a batch."""
        return self.batches.batch_size // self.samples

    def visits(self, number: int) -> tuple[Tensor, Tensor]:
        """Of each group of batch ``number``: the place of its timestep in ``timesteps``, and its half."""
        visit = torch.arange(self.groups) + (number - 1) * self.groups
        turn, place = visit // len(self.timesteps), visit % len(self.timesteps)
        orders = {
            int(one): torch.randperm(len(self.timesteps), generator=seeded_generator(self.seed, _ORDER_STREAM, one))
            for one in turn.unique().tolist()
        }
        task = torch.stack([orders[one][at] for one, at in zip(turn.tolist(), place.tolist(), strict=True)])
        return task, turn % HALVES

    def measure(self, number: int) -> None:
        """Adds batch ``number``."""
        task, half = self.visits(number)
        batch, group = self._draw(number, task)
        collector = SketchCollector(self.projection, self.groups, batch.t.device)
        recorder, _ = backward(self.subject, batch, group, self.groups, collector)
        recorder.finish()
        clear_gradients(self.subject)
        self.sums.add(collector.table, half, task, torch.full((self.groups,), self.samples))

    def coverage(self) -> float:
        """Share of the parameters whose gradients the sketches hold, found out and verified on the first batch."""
        batch, group = self._draw(1, self.visits(1)[0])
        expected = expected_gradient(self.subject, batch, group, self.groups)
        recorder, _ = backward(self.subject, batch, group, self.groups)
        gramian = recorder.result()
        clear_gradients(self.subject)
        wrong = contradicted_layers(self.subject, gramian, expected)
        return without_layers(gramian, wrong, trained_parameters(self.subject.backbone)).coverage

    def _draw(self, number: int, task: Tensor) -> tuple[NoisedBatch, Tensor]:
        x, y, generator = self.batches.images(number)
        t = self.timesteps[task].repeat_interleave(self.samples)
        batch = noised(self.subject, x, y, t, generator)
        return batch, torch.arange(self.groups, device=batch.t.device).repeat_interleave(self.samples)

    def ends_a_pair_of_passes(self, number: int) -> bool:
        """Whether batch ``number`` is the first after which both halves have gone through all timesteps once more."""
        both = HALVES * len(self.timesteps)
        return number * self.groups // both > (number - 1) * self.groups // both

    def affinity(self, projection: Projection | None = None) -> xr.Dataset:
        """What can be said so far; see `timestep_affinity`.

        Args:
            projection: Projects what was kept once more, where that is the gradients themselves.
        """
        means = self.sums.means()
        if projection is not None:
            means = self._projected(means, projection)
        log_snr = self.subject.module.diffusion.log_snr.cpu()[self.timesteps]
        return timestep_affinity(means.cpu().numpy(), self.timesteps.numpy(), log_snr.numpy())

    def precision(self) -> float:
        """Root mean square standard error of the defined cosines from sampling; infinite if none is defined."""
        error = self.affinity().attrs["sampling_error"]
        return error if math.isfinite(error) else math.inf

    def _projected(self, means: Tensor, projection: Projection) -> Tensor:
        rows = means.flatten(0, 1)
        collector = SketchCollector(projection, len(rows), rows.device)
        start = 0
        for index, size in enumerate(_sizes(self.subject)):
            collector.collect(index, 0, rows[:, start : start + size])
            start += size
        return collector.table.view(*means.shape[:2], -1)


def projection_of(args: argparse.Namespace, subject: Subject) -> Projection:
    """The sketch that the options ask for; for a comparison with exact gradients, none.

    Raises:
        UserInputError: If the sketch has no sensible size, or exact gradients would not fit.
    """
    sketch = CountSketch(args.sketch_size, args.seed)
    if not args.check_exact:
        return sketch
    exact = Unprojected(_sizes(subject))
    needed = 4 * HALVES * args.timesteps * exact.width
    if needed > _EXACT_BYTES:
        raise UserInputError(
            f"--check-exact would keep {args.timesteps} gradients of {exact.width:,} numbers in two halves, "
            f"{needed / 1e9:.0f} GB: use a smaller model or fewer --timesteps"
        )
    return exact


def check_exact(probe: TimestepProbe, args: argparse.Namespace) -> list[dict[str, float]]:
    """How far the cosines from sketches of several sizes are from those of the exact gradients.

    Returns:
        For each D: ``width``, ``error`` (root mean square difference over the pairs defined in both) and ``stated``
        (what the sketch itself states).
    """
    exact = probe.affinity()["cosine"].values
    off_diagonal = ~np.eye(len(exact), dtype=bool)
    rows = []
    for fraction in _CHECKED_FRACTIONS:
        width = args.sketch_size // fraction
        if width < 2:
            continue
        found = probe.affinity(CountSketch(width, args.seed))
        difference = (found["cosine"].values - exact)[off_diagonal]
        known = difference[np.isfinite(difference)]
        error = float(np.sqrt(np.mean(known**2))) if len(known) else math.nan
        rows.append({"width": width, "error": error, "stated": found.attrs["sketch_error"]})
    return rows


def affinity_file(affinity: xr.Dataset) -> bytes:
    """The result as a NetCDF file, readable with `xarray.load_dataset`."""
    small = {name: affinity[name].astype(np.int32) for name in ("timestep", "other_timestep")}  # NetCDF 3 has no int64
    return bytes(affinity.assign_coords(small).to_netcdf(engine="scipy"))


def _sizes(subject: Subject) -> list[int]:
    return [parameter.numel() for parameter in subject.backbone.parameters() if parameter.requires_grad]
