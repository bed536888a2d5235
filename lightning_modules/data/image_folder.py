"""Images in one folder per class, as ImageNet is laid out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from lightning_modules.data.images import ImageData
from lightning_modules.errors import UserInputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ImageFiles(Dataset):
    """Image files decoded on access to (3, size, size) in [-1, 1]: resized so that the short side fits, then cropped.

    Resizing is PIL's bicubic with antialiasing, after box halvings while the image is more than twice too large (the
    pre-processing of ADM, Dhariwal and Nichol 2021).
    """

    def __init__(self, files: list[tuple[Path, int]], size: int, channels: int) -> None:
        self.files = files
        self.size = size
        self.channels = channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                picture = image.convert("L" if self.channels == 1 else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise UserInputError(f"cannot read image {path}: {error}. Remove or replace the file") from error
        while min(picture.size) >= 2 * self.size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        scale = self.size / min(picture.size)
        width, height = (max(self.size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        pixels = np.asarray(picture.crop((left, top, left + self.size, top + self.size)), dtype=np.float32)
        tensor = torch.from_numpy(pixels).reshape(self.size, self.size, self.channels).permute(2, 0, 1)
        return tensor / 127.5 - 1, label


class ImageFolderData(ImageData):
    """``root/<class>/<image>``: classes are the sorted folder names, images may lie at any depth below.

    Args:
        root: The folder.
        image_size: Images are resized and cropped to this many pixels.
        channels: 3 for colour, 1 for grey.
        holdout: Number of images held out, chosen by a fixed permutation.
        batch_size: See `ImageData`.
        val_batch_size: See `ImageData`.
        seed: See `ImageData`.
        num_workers: See `ImageData`.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 64,
        channels: int = 3,
        holdout: int = 1000,
        batch_size: int = 64,
        val_batch_size: int = 256,
        seed: int = 0,
        num_workers: int = 2,
    ) -> None:
        super().__init__(batch_size, val_batch_size, seed, num_workers)
        if channels not in (1, 3):
            raise UserInputError(f"data channels must be 1 (grey) or 3 (colour), got {channels}")
        if image_size < 1 or holdout < 1:
            raise UserInputError(f"data image_size and holdout must be at least 1, got {image_size} and {holdout}")
        self.root = Path(root)
        self.image_size = image_size
        self.channels = channels
        self.holdout = holdout
        self.name = self.root.name
        self._files = self._find_files()
        self.num_classes = len({label for _, label in self._files})

    def _find_files(self) -> list[tuple[Path, int]]:
        if not self.root.is_dir():
            raise UserInputError(f"no image folder at {self.root.absolute()}: data root must hold one folder per class")
        folders = sorted(folder for folder in self.root.iterdir() if folder.is_dir())
        files = []
        for label, folder in enumerate(folders):
            found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
            if not found:
                raise UserInputError(f"class folder {folder} holds no images ({', '.join(sorted(SUFFIXES))})")
            files += [(path, label) for path in found]
        if len(files) <= self.holdout:
            raise UserInputError(
                f"{self.root.absolute()} holds {len(files)} images in class folders, but {self.holdout} are to be held "
                "out: add images or lower data holdout"
            )
        return files

    def load(self) -> tuple[ImageFiles, ImageFiles]:
        """File lists only; images are decoded when a batch needs them."""
        order = torch.randperm(len(self._files), generator=torch.Generator().manual_seed(0)).tolist()
        held = [self._files[i] for i in sorted(order[: self.holdout])]
        kept = [self._files[i] for i in sorted(order[self.holdout :])]
        return ImageFiles(kept, self.image_size, self.channels), ImageFiles(held, self.image_size, self.channels)
