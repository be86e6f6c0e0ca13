"""The digits, as arrays and as folders of images."""

import numpy as np
import pytest
from PIL import Image

from deit_fast.train import digits

pytest.importorskip("sklearn")


def test_test_digits_are_held_out():
    train, test = digits.load()
    assert len(train.labels) + len(test.labels) == 1797 and len(test.labels) == 450
    assert train.pixels.shape == (1347, 8, 8) and train.pixels.dtype == np.uint8
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    seen = {image.tobytes() for image in train.pixels}
    assert not any(image.tobytes() in seen for image in test.pixels)


def test_folders_hold_each_digit_by_its_class(tmp_path):
    digits.write_folder(tmp_path, most=20)
    for name, split in zip(("train", "val"), digits.load(), strict=True):
        files = sorted(tmp_path.glob(f"{name}/*/*.png"), key=lambda path: path.name)
        assert [int(path.parent.name) for path in files] == split.labels[:20].tolist()
        assert all(
            np.array_equal(np.asarray(Image.open(path)), pixels)
            for path, pixels in zip(files, split.pixels, strict=False)
        )
