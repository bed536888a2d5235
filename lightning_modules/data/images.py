"""What every source of images has in common: shapes, the fixed hold-out, and batches that depend on the step alone."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_modules.errors import UserInputError
from lightning_modules.seeding import seeded_generator


class ImageTensors(Dataset):
    """Images held in memory: ``images`` (N, C, H, W) in [-1, 1], ``labels`` (N,) int64. Fetches whole batches."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """One gather for a whole batch; `DataLoader` prefers this to collating single images."""
        rows = torch.tensor(indices)
        return self.images[rows], self.labels[rows]


def keep_batch(batch: Any) -> Any:
    """Collates nothing: the data set fetches whole batches."""
    return batch


class StepBatchSampler(Sampler[list[int]]):
    """Endless shuffled batches; batch number n is a pure function of (seed, n).

    The images form a stream of seeded permutations, cut into batches without dropping any. So runs of one seed see the
    same images in the same order whatever their method, and a resumed run goes on exactly where it stopped.

    Args:
        num_samples: Size of the data set.
        batch_size: Samples per batch, over all processes.
        seed: Seed of the order.
        start: Number of the first batch to yield.
        rank: This process takes every ``world_size``-th sample of a batch, from this one on.
        world_size: Number of processes.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self._epoch = -1
        self._order: list[int] = []

    def _sample(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            self._order = torch.randperm(self.num_samples, generator=seeded_generator(self.seed, epoch)).tolist()
            self._epoch = epoch
        return self._order[offset]

    def batch(self, number: int) -> list[int]:
        """Indices of this process's part of batch ``number``."""
        first = number * self.batch_size
        return [self._sample(p) for p in range(first + self.rank, first + self.batch_size, self.world_size)]

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.batch, itertools.count(self.start))


class StepDataLoader(DataLoader):
    """A loader whose place follows from the trainer's step, which tells Lightning that it resumes exactly."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: the sampler is built at the right place when training resumes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class ImageData(pl.LightningDataModule, abc.ABC):
    """Base of all data modules; a source implements `load` and sets the attributes below.

    Attributes:
        name: Name of the data set, for tags and reports.
        channels: Channels of an image.
        image_size: Height and width in pixels.
        num_classes: Number of labels.

    Args:
        batch_size: Samples per batch, over all processes.
        val_batch_size: Samples per validation batch.
        seed: Seed of the data order. The hold-out does not depend on it.
        num_workers: Loader processes; 0 loads in the training process.
    """

    name: str
    channels: int
    image_size: int
    num_classes: int

    def __init__(self, batch_size: int = 64, val_batch_size: int = 256, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        for argument, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value < 1:
                raise UserInputError(f"data {argument} must be at least 1, got {value}")
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.train_set: Dataset | None = None
        self.val_set: Dataset | None = None

    @abc.abstractmethod
    def load(self) -> tuple[Dataset, Dataset]:
        """The training and the held-out images.

        Raises:
            UserInputError: If there is no usable data at the place the user named.
        """

    def setup(self, stage: str | None = None) -> None:
        """Loads the data once."""
        if self.train_set is None:
            self.train_set, self.val_set = self.load()

    def train_dataloader(self) -> DataLoader:
        """Endless batches ``(images, labels)``, from the trainer's step on."""
        rank, world_size, start = 0, 1, 0
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            start = self.trainer.global_step * self.trainer.accumulate_grad_batches
        assert self.train_set is not None
        sampler = StepBatchSampler(
            len(self.train_set),  # type: ignore[arg-type]
            self.batch_size,
            self.seed,
            start,
            rank,
            world_size,
        )
        return StepDataLoader(self.train_set, batch_sampler=sampler, **self._loader_options(self.train_set))

    def val_dataloader(self) -> DataLoader:
        """The held-out images in fixed order; each process takes all of them."""
        assert self.val_set is not None
        return DataLoader(self.val_set, batch_size=self.val_batch_size, **self._loader_options(self.val_set))

    def _loader_options(self, dataset: Dataset) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "collate_fn": keep_batch if isinstance(dataset, ImageTensors) else None,
            "pin_memory": torch.cuda.is_available(),
        }


def split_holdout(images: Tensor, labels: Tensor, num_holdout: int) -> tuple[ImageTensors, ImageTensors]:
    """Splits off ``num_holdout`` images by a permutation that never changes, so that runs stay comparable."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held, kept = order[:num_holdout], order[num_holdout:]
    return ImageTensors(images[kept], labels[kept]), ImageTensors(images[held], labels[held])
