"""Tests for `lightning_modules/data/`."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.data.digits import DigitsData
from lightning_modules.data.image_folder import ImageFiles, ImageFolderData
from lightning_modules.data.images import StepBatchSampler
from lightning_modules.errors import UserInputError


def test_batches_depend_on_seed_and_number_alone():
    first = StepBatchSampler(10, 4, seed=1)
    expected = [first.batch(n) for n in range(20)]
    resumed = iter(StepBatchSampler(10, 4, seed=1, start=7))
    assert [next(resumed) for _ in range(5)] == expected[7:12]
    assert StepBatchSampler(10, 4, seed=2).batch(0) != expected[0]


def test_every_image_is_seen_equally_often():
    sampler = StepBatchSampler(10, 4, seed=0)
    seen = Counter(index for n in range(25) for index in sampler.batch(n))
    assert set(seen.values()) == {10}
    assert len(seen) == 10


def test_processes_share_a_batch_without_overlap():
    whole = StepBatchSampler(50, 8, seed=0).batch(3)
    parts = [StepBatchSampler(50, 8, seed=0, rank=rank, world_size=2).batch(3) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    assert len(parts[0]) == len(parts[1]) == 4


def test_digits_are_scaled_and_split_without_overlap():
    data = DigitsData(batch_size=8)
    data.setup()
    assert len(data.train_set) == 1500
    assert len(data.val_set) == 297
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    everything = torch.cat([data.train_set.images, data.val_set.images])
    assert everything.min() == -1
    assert everything.max() == 1
    train = {image.numpy().tobytes() for image in data.train_set.images}
    held = [image.numpy().tobytes() for image in data.val_set.images]
    assert not train.intersection(held)
    other = DigitsData(batch_size=8, seed=1)
    other.setup()
    assert torch.equal(other.val_set.images, data.val_set.images), "the hold-out is the same for every seed"


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(["cat", "dog"]):
        (tmp_path / name / "deep").mkdir(parents=True)
        for index in range(4):
            pixels = np.full((40, 60 + index, 3), 60 * label + index, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / "deep" / f"{index}.png")
    return tmp_path


def test_a_folder_of_images_is_resized_cropped_scaled_and_labelled_by_folder(folder):
    data = ImageFolderData(str(folder), image_size=16, holdout=2, batch_size=6, num_workers=0)
    data.setup()
    assert data.num_classes == 2
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (6, 3, 16, 16)
    level = ((images + 1) * 127.5).mean((1, 2, 3)).round().long()
    assert torch.equal(level // 60, labels)
    assert len(data.val_set) == 2


def test_cropping_keeps_the_centre(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((16, 32), dtype=np.uint8)
    pixels[:, 8:24] = 255
    for index in range(2):
        Image.fromarray(pixels).save(tmp_path / "a" / f"{index}.png")
    data = ImageFolderData(str(tmp_path), image_size=16, channels=1, holdout=1, num_workers=0)
    data.setup()
    assert (data.train_set[0][0] == 1).all()


def test_unusable_folders_are_refused_by_name(folder, tmp_path):
    with pytest.raises(UserInputError, match=r"no image folder at .*nowhere"):
        ImageFolderData(str(tmp_path / "nowhere"))
    with pytest.raises(UserInputError, match="holds 8 images"):
        ImageFolderData(str(folder), holdout=8)
    (folder / "empty").mkdir()
    with pytest.raises(UserInputError, match="empty holds no images"):
        ImageFolderData(str(folder), holdout=1)
    (folder / "empty" / "broken.png").write_bytes(b"not an image")
    data = ImageFolderData(str(folder), image_size=16, holdout=1, num_workers=0)
    data.setup()
    images = [*data.train_set.files, *data.val_set.files]
    broken = ImageFiles([entry for entry in images if entry[0].name == "broken.png"], 16, 3)
    with pytest.raises(UserInputError, match=r"broken\.png"):
        broken[0]
