"""scikit-learn's handwritten digits: 1,797 real 8 × 8 images of ten classes, which come with the package."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deit_fast._extras import require


class Split(NamedTuple):
    """pixels: [N, 8, 8] uint8, white on black; labels: [N]."""

    pixels: np.ndarray
    labels: np.ndarray


def load(seed: int = 0) -> tuple[Split, Split]:
    """Training digits and, apart from them, test digits: a quarter, every class by its share."""
    require("sklearn", extra="demo")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(pixels, digits.target, test_size=0.25, random_state=seed, stratify=digits.target)
    train_pixels, test_pixels, train_labels, test_labels = parts
    return Split(train_pixels, train_labels), Split(test_pixels, test_labels)


def write_folder(path: str | os.PathLike, seed: int = 0, most: int | None = None) -> None:
    """The digits of `load`, `most` of each split, as images in `train` and `val`, a folder a class."""
    require("PIL", extra="demo")
    from PIL import Image

    for name, split in zip(("train", "val"), load(seed), strict=True):
        for number, (pixels, label) in enumerate(zip(split.pixels[:most], split.labels, strict=False)):
            folder = Path(path) / name / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number:04d}.png")
