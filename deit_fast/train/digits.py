"""scikit-learn's handwritten digits: 1,797 real 8 × 8 images of ten classes, which come with the package."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast._extras import require
from deit_fast.data import DeiTImageProcessor

CLASSES = 10
IMG_SIZE = 16

# How far a training image is varied: radians, a share of its size, and of half its size.
TURN = 0.2
STRETCH = 0.1
MOVE = 0.15


class Split(NamedTuple):
    """pixels: [N, 8, 8] uint8, white on black; images: the same prepared, [N, 3, 16, 16] float32; labels: [N]."""

    pixels: np.ndarray
    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "Split":
        """The same with images and labels there."""
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


def image_processor() -> DeiTImageProcessor:
    """Bilinear to `IMG_SIZE`, values from -1 to 1."""
    return DeiTImageProcessor(size=IMG_SIZE, crop_size=IMG_SIZE, resample=2)


def load(seed: int = 0) -> tuple[Split, Split]:
    """Training digits and, apart from them, test digits: a quarter, every class by its share."""
    require("sklearn", extra="demo")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(pixels, digits.target, test_size=0.25, random_state=seed, stratify=digits.target)
    train_pixels, test_pixels, train_labels, test_labels = parts
    return _split(train_pixels, train_labels), _split(test_pixels, test_labels)


def _split(pixels: np.ndarray, labels: np.ndarray) -> Split:
    rgb = np.repeat(pixels[..., None], 3, axis=-1)
    images = image_processor()(list(rgb), return_tensors="pt").pixel_values
    return Split(pixels, images, torch.from_numpy(labels).long())


def write_folder(path: str | os.PathLike, seed: int = 0, most: int | None = None) -> None:
    """The digits of `load`, `most` of each split, as images in `train` and `val`, a folder a class."""
    require("PIL", extra="demo")
    from PIL import Image

    for name, split in zip(("train", "val"), load(seed), strict=True):
        for number, (pixels, label) in enumerate(zip(split.pixels[:most], split.labels.tolist(), strict=False)):
            folder = Path(path) / name / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number:04d}.png")


def batches(split: Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, shuffled anew each epoch, each image varied a little each time.

    The same seed gives the same batches. An epoch's last, smaller batch is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(split.labels), generator=generator)
        for index in order.split(batch_size)[: len(order) // batch_size]:
            yield _varied(split.images[index], generator), split.labels[index]


def _varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned, stretched and moved a little, black coming in at the edges."""
    angle, stretch, right, down = torch.empty(4, len(images)).uniform_(-1, 1, generator=generator).to(images.device)
    angle, stretch = TURN * angle, 1 + STRETCH * stretch
    cos, sin = stretch * angle.cos(), stretch * angle.sin()
    rows = torch.stack([cos, -sin, MOVE * right, sin, cos, MOVE * down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    # Outside, grid_sample takes 0, so black, -1, is made that.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1
