"""The images or latents that `dtr-lab probe` measures on, and its batches of them."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, default_collate

from experiments.probing.subject import Subject
from lightning_modules.data.digits import DigitsData
from lightning_modules.data.image_folder import ImageFolderData
from lightning_modules.data.images import ImageData, ImageTensors, StepBatchSampler
from lightning_modules.errors import UserInputError
from lightning_modules.seeding import seeded_generator
from lightning_modules.tracking import records

_DATA_STREAM, _DRAW_STREAM = 10, 11
_CHECKED_AT_ONCE = 4096
_SOURCES: dict[str, type[ImageData]] = {"DigitsData": DigitsData, "ImageFolderData": ImageFolderData}


@dataclasses.dataclass(frozen=True)
class ProbeData:
    """Images or latents to measure on.

    Attributes:
        name: What to call them.
        dataset: Yields (x (C, H, W), label); labels are missing if ``labelled`` is False.
        labelled: Whether labels mean anything.
        held_out: Images that training never saw, where the source keeps some back.
    """

    name: str
    dataset: Dataset
    labelled: bool = True
    held_out: Dataset | None = None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def fetch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Samples (B, C, H, W) and labels (B,)."""
        if isinstance(self.dataset, ImageTensors):
            return self.dataset.__getitems__(indices)
        x, y = default_collate([self.dataset[index] for index in indices])
        return x, y


def find_data(args: argparse.Namespace, subject: Subject) -> ProbeData:
    """The data that the options name, else those that the checkpoint's run was trained on.

    Raises:
        UserInputError: If there are none, or they do not fit the network.
    """
    if args.data_path is not None and args.data not in ("image_folder", "latents"):
        raise UserInputError("--data-path belongs to --data image_folder or --data latents")
    if args.data in ("image_folder", "latents") and args.data_path is None:
        raise UserInputError(f"--data {args.data} needs --data-path")
    if args.data == "latents":
        data = _latents(args.data_path, args.latent_scale)
    elif args.data == "image_folder":
        config = subject.backbone.config
        folder = ImageFolderData(str(args.data_path), config.input_size, config.in_channels, holdout=1)
        data = ProbeData(folder.name, ConcatDataset(folder.load()))
    elif args.data == "digits" or subject.dataset == DigitsData.name:
        data = _of_source(DigitsData())
    else:
        data = _recorded(args, subject)
    _check_fit(data, subject, args.batch_size)
    return data


def _recorded(args: argparse.Namespace, subject: Subject) -> ProbeData:
    """The training images as the run's configuration names them; it lies with the run in MLflow."""
    cure = "name the data: --data image_folder --data-path DIR, --data latents --data-path FILE, or --data digits"
    if subject.run_id is None:
        raise UserInputError(f"{subject.path} does not say what it was trained on: {cure}")
    data = _recorded_settings(args.tracking_uri, subject.run_id)
    source = _SOURCES.get(str(data.get("class_path", "")).rpartition(".")[2])
    if source is None:
        raise UserInputError(
            f"{subject.path} was trained on {subject.dataset!r}, and where that lies cannot be read from its run "
            f"{subject.run_id}: {cure}, or the MLflow store of that run with --tracking-uri"
        )
    return _of_source(source(**data.get("init_args", {})))


def _of_source(images: ImageData) -> ProbeData:
    trained, held_out = images.load()
    return ProbeData(images.name, trained, held_out=held_out)


def _recorded_settings(tracking_uri: str | None, run_id: str) -> Mapping[str, Any]:
    """The ``data`` part of a run's configuration; empty if it cannot be read."""
    from mlflow.exceptions import MlflowException

    from lightning_modules.tracking.store import check_store, mlflow_client, resolve_tracking_uri, sqlite_path

    uri = resolve_tracking_uri(tracking_uri)
    path = sqlite_path(uri)
    if path is not None and not path.is_file():  # a client would create it
        return {}
    check_store(uri)
    try:
        with tempfile.TemporaryDirectory(prefix="dtr-lab-") as folder:
            file = mlflow_client(uri).download_artifacts(run_id, records.CONFIG_PATH, folder)
            config = yaml.safe_load(Path(file).read_text())
    except (MlflowException, OSError, yaml.YAMLError):
        return {}
    return config.get("data", {}) if isinstance(config, dict) else {}


def _latents(path: Path, scale: float) -> ProbeData:
    """Arrays x (N, C, H, W) and, if there are labels, y (N,), from .npz, .npy or .pt; x is multiplied by ``scale``."""
    if not path.is_file():
        raise UserInputError(f"--data-path: no file {path.absolute()}")
    try:
        if path.suffix == ".pt":
            stored: Any = torch.load(path, map_location="cpu", weights_only=True)
        else:
            stored = np.load(path, allow_pickle=False)
        arrays = {"x": stored} if isinstance(stored, Tensor | np.ndarray) else dict(stored)
        x = torch.as_tensor(arrays["x"])
        y = torch.as_tensor(arrays["y"]) if "y" in arrays else None
    except Exception as error:  # whatever the file makes the readers say
        raise UserInputError(
            f"--data-path {path}: cannot read latents: {error}. It must be an .npz or .pt file with x (N, C, H, W) and "
            "optionally y (N,), or an .npy file with x alone"
        ) from error
    if x.ndim != 4 or not x.is_floating_point() or (y is not None and y.shape != (len(x),)):
        shapes = f"x {tuple(x.shape)} {x.dtype}" + ("" if y is None else f", y {tuple(y.shape)}")
        raise UserInputError(f"--data-path {path}: latents must be real x (N, C, H, W) with y (N,), got {shapes}")
    labels = torch.zeros(len(x), dtype=torch.long) if y is None else y.long()
    if y is not None and not torch.equal(labels.to(y.dtype), y):
        raise UserInputError(f"--data-path {path}: labels y must be whole numbers, the classes; some are not")
    return ProbeData(path.stem, ImageTensors(x.float() * scale, labels), labelled=y is not None)


def _check_fit(data: ProbeData, subject: Subject, batch_size: int) -> None:
    config = subject.backbone.config
    if len(data) < batch_size:
        raise UserInputError(
            f"{data.name} has {len(data)} samples, but a batch takes {batch_size} different ones: lower --batch-size"
        )
    shape = tuple(data.fetch([0])[0].shape[1:])
    expected = (config.in_channels, config.input_size, config.input_size)
    if shape != expected:
        raise UserInputError(
            f"{data.name} has samples of shape {shape}, but the network of {subject.path} takes {expected}: "
            "name its own data with --data and --data-path"
        )
    if isinstance(data.dataset, ImageTensors) and (bad := _not_finite(data.dataset.images)):
        raise UserInputError(
            f"{bad} of {len(data)} samples of {data.name} hold NaN or infinite numbers: leave them out of the file"
        )
    if config.num_classes == 0:
        return
    if not data.labelled and not config.has_null_class:
        raise UserInputError(f"{data.name} has no labels y, and the network of {subject.path} cannot do without")
    labels = getattr(data.dataset, "labels", None)
    if data.labelled and labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < config.num_classes:
        raise UserInputError(
            f"{data.name} has labels from {int(labels.min())} to {int(labels.max())}, but the network of "
            f"{subject.path} knows 0 to {config.num_classes - 1}"
        )


def _not_finite(x: Tensor) -> int:
    """How many samples of x (N, C, H, W) hold a NaN or an infinite number."""
    return sum(int((~part.isfinite()).flatten(1).any(1).sum()) for part in x.split(_CHECKED_AT_ONCE))


class Batches:
    """Batch number n = 1, 2, …: its images, and what is drawn for it, as functions of (seed, n) alone.

    Images come from seeded permutations of the data, so a batch holds no image twice, and batches share none until the
    data are used up; noise, timesteps and dropped labels are new in every batch. Everything is drawn on the CPU, so
    that devices agree.
    """

    def __init__(self, subject: Subject, data: ProbeData, batch_size: int, seed: int) -> None:
        self.subject = subject
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        # Hashed, so that the order is not that of a training with the same seed.
        shuffle = int(seeded_generator(seed, _DATA_STREAM).initial_seed())
        self._sampler = StepBatchSampler(len(data), batch_size, shuffle)

    def images(self, number: int, *, drop_labels: bool = True) -> tuple[Tensor, Tensor | None, torch.Generator]:
        """Images (B, C, H, W), labels (B,) of which some are dropped as in training, and the generator of the rest."""
        generator = seeded_generator(self.seed, _DRAW_STREAM, number)
        x, labels = self.data.fetch(self._sampler.batch(number - 1))
        backbone = self.subject.backbone
        if backbone.config.num_classes == 0:
            return x, None, generator
        if not self.data.labelled:
            return x, torch.full_like(labels, backbone.null_class), generator
        return x, backbone.drop_labels(labels, generator) if drop_labels else labels, generator
