"""Random projections of gradients, so that affinities of many timesteps fit into memory.

A T x T matrix of cosines needs T gradients at once: 132 GB for the 1,000 timesteps of DiT-S/2. A sketch keeps D numbers
of each instead. It is linear, so layers, pieces of layers and batches add up, and inner products stay unbiased.

`CountSketch` gives coordinate j a random sign and one of D buckets. For fixed x and y, over its signs and buckets,

    E<Sx, Sy> = <x, y>,    Var<Sx, Sy> <= (|x|^2 |y|^2 + <x, y>^2) / D

(Weinberger et al. 2009, arXiv 0902.2206, lemma 2, which is this bound without its terms of coordinates that cannot
collide). The right side is the variance of a dense Gaussian projection, so nothing is lost by one non-zero a column.
More of them (sparse Johnson-Lindenstrauss, Kane and Nelson, arXiv 1012.1577) leave the variance as it is and only thin
the tails for vectors with few large coordinates (Freksen et al. 2018), at as many times the cost. A gradient of n
coordinates costs n multiply-adds here, against n D for a dense projection. Cosines between the sketches of two vectors
err by about (1 - cosine^2) / sqrt(D), whatever n is.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_modules.errors import UserInputError

_SIGNS_PER_BLOCK = 256
_WORDS_PER_BLOCK = 4
_SIGN_STREAM, _SHIFT_STREAM = 0, 1
_SLAB = 1 << 20
"""Coordinates whose signs are held at a time."""


class Projection(Protocol):
    """A linear map of gradients to ``width`` numbers, applied piece by piece."""

    @property
    def width(self) -> int:
        """D."""

    def add(self, table: Tensor, index: int, start: int, rows: Tensor) -> None:
        """Adds the image of a piece of parameter ``index`` to ``table`` (G, D), in place; see `CountSketch.add`."""


class CountSketch:
    """The projection described above, as a function of (seed, parameter, coordinate) alone.

    Coordinates are taken D at a time; such a tile is shifted cyclically by a random amount, so its D coordinates never
    collide, and two coordinates of different tiles collide with probability 1 / D. Against a free choice of bucket
    this only removes collisions, and it turns scattered additions, which are slow on a CPU and in no fixed order on a
    GPU, into sums of slices. Signs and shifts come from a counter-based generator (Philox) whenever they are needed:
    nothing of the model's size is stored, and the cut into pieces, the order and the device do not matter.

    Args:
        width: D, the number of buckets.
        seed: Seed of the projection. Only sketches of one width and seed may be compared or added.

    Raises:
        UserInputError: If the width is not positive or the seed negative.
    """

    def __init__(self, width: int, seed: int) -> None:
        if width < 1 or seed < 0:
            raise UserInputError(f"a sketch needs a positive width and a non-negative seed, got {width} and {seed}")
        self.width = width
        self.seed = seed

    def add(self, table: Tensor, index: int, start: int, rows: Tensor) -> None:
        """Adds the sketch of a piece of the gradients.

        Args:
            table: Sketches so far (G, D); changed in place.
            index: Number of the parameter.
            start: Place of the piece in the flattened parameter.
            rows: The piece of each group's gradient (G, n).
        """
        for slab in range(0, rows.shape[1], _SLAB):
            piece = rows[:, slab : slab + _SLAB].to(table.dtype)
            self._add_slab(table, index, start + slab, piece)

    def _add_slab(self, table: Tensor, index: int, start: int, piece: Tensor) -> None:
        end = start + piece.shape[1]
        signs = torch.from_numpy(self.signs(index, start, end)).to(table)
        first_tile = start // self.width
        shifts = self.shifts(index, first_tile, -(-end // self.width))
        for tile, shift in enumerate(shifts.tolist(), start=first_tile):
            low, high = max(tile * self.width, start), min((tile + 1) * self.width, end)
            bucket = (low + shift) % self.width
            until_edge = min(high - low, self.width - bucket)
            for source, target, length in (
                (low - start, bucket, until_edge),
                (low - start + until_edge, 0, high - low - until_edge),
            ):
                if length:
                    part = slice(source, source + length)
                    table[:, target : target + length].addcmul_(piece[:, part], signs[part])

    def signs(self, index: int, start: int, end: int) -> np.ndarray:
        """Signs of the coordinates ``start <= j < end`` of a parameter, float32."""
        first_block = start // _SIGNS_PER_BLOCK
        blocks = -(-end // _SIGNS_PER_BLOCK) - first_block
        words = self._words(index, _SIGN_STREAM, first_block, blocks).astype("<u8", copy=False)
        bits = np.unpackbits(words.view(np.uint8))
        skipped = start - first_block * _SIGNS_PER_BLOCK
        return 1.0 - 2.0 * bits[skipped : skipped + end - start].astype(np.float32)

    def shifts(self, index: int, first_tile: int, end_tile: int) -> np.ndarray:
        """By how many buckets each of these tiles of a parameter is shifted, int64."""
        first_block = first_tile // _WORDS_PER_BLOCK
        blocks = -(-end_tile // _WORDS_PER_BLOCK) - first_block
        words = self._words(index, _SHIFT_STREAM, first_block, blocks)
        skipped = first_tile - first_block * _WORDS_PER_BLOCK
        return (words[skipped : skipped + end_tile - first_tile] % np.uint64(self.width)).astype(np.int64)

    def _words(self, index: int, stream: int, first_block: int, blocks: int) -> np.ndarray:
        generator = np.random.Philox(
            counter=np.array([first_block, 0, 0, stream], dtype=np.uint64),
            key=np.array([self.seed, index], dtype=np.uint64),
        )
        return generator.random_raw(blocks * _WORDS_PER_BLOCK)


class Unprojected:
    """The identity, for models small enough to compare a sketch with the exact gradients.

    Args:
        sizes: Number of elements of each parameter, in the order of their numbers.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._offsets = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self.width: int = self._offsets[-1]

    def add(self, table: Tensor, index: int, start: int, rows: Tensor) -> None:
        """Copies a piece to its place; arguments as in `CountSketch.add`."""
        low = self._offsets[index] + start
        table[:, low : low + rows.shape[1]] += rows


class SketchCollector:
    """Collects the sketches of one batch's group gradients; for `GramianRecorder(collector=...)`.

    Attributes:
        table: (G, D), float32; once the measurement has ended, sketches of the gradients of the groups' mean losses.

    Args:
        projection: What to apply.
        num_groups: G.
        device: Where the gradients are.
    """

    def __init__(self, projection: Projection, num_groups: int, device: torch.device | str = "cpu") -> None:
        self.projection = projection
        self.table = torch.zeros((num_groups, projection.width), device=device)

    def collect(self, index: int, start: int, rows: Tensor) -> None:
        """Adds a piece of parameter ``index``: ``rows`` (G, n) from flat place ``start`` on."""
        self.projection.add(self.table, index, start, rows)

    def finish(self, factors: Tensor) -> None:
        """Scales the sketches to those of the groups' mean losses: ``factors`` (G,)."""
        self.table *= factors.to(self.table)[:, None]


class SketchSums:
    """Mean gradients of many tasks in independent halves, as sketches, over any number of batches.

    Holds ``halves * tasks * D`` numbers whatever the size of the model.

    Attributes:
        sums: Sums over samples (halves, tasks, D), float32.
        counts: Samples (halves, tasks), int64.
    """

    def __init__(self, halves: int, tasks: int, width: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros((halves, tasks, width), device=device)
        self.counts = torch.zeros((halves, tasks), dtype=torch.int64)

    def add(self, table: Tensor, half: Tensor, task: Tensor, counts: Tensor) -> None:
        """Adds a batch.

        Args:
            table: Sketches of the gradients of its groups' mean losses (G, D).
            half: Half of each group (G,).
            task: Task of each group (G,).
            counts: Samples of each group (G,).
        """
        # One group at a time: a group may occur twice, and scattered additions have no fixed order on a GPU.
        places = zip(half.tolist(), task.tolist(), counts.tolist(), strict=True)
        for row, (at_half, at_task, count) in enumerate(places):
            self.sums[at_half, at_task].add_(table[row], alpha=count)
            self.counts[at_half, at_task] += count

    def means(self) -> Tensor:
        """Sketches of the gradients of the mean losses (halves, tasks, D); NaN where there were no samples."""
        counts = self.counts.to(self.sums.device, self.sums.dtype)
        return self.sums / torch.where(counts > 0, counts, torch.nan)[..., None]
