"""Scanned handwritten digits, 8 x 8 pixels, from inside scikit-learn: real images without a download."""

from __future__ import annotations

import torch

from lightning_modules.data.images import ImageData, ImageTensors, split_holdout

HOLDOUT = 297


class DigitsData(ImageData):
    """UCI optical digits (Alpaydin and Kaynak, 1998): 1,797 grey images (1, 8, 8), 10 classes; 297 are held out."""

    name = "digits"
    channels = 1
    image_size = 8
    num_classes = 10

    def load(self) -> tuple[ImageTensors, ImageTensors]:
        """Grey levels 0..16, scaled to [-1, 1]."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
        return split_holdout(images, torch.from_numpy(digits.target).long(), HOLDOUT)
