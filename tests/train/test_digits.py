"""The digits and their teacher."""

import itertools

import numpy as np
import pytest
import torch

from deit_fast.train import digits
from deit_fast.train.teacher import conv_net

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def splits() -> tuple[digits.Split, digits.Split]:
    return digits.load()


def test_test_digits_are_held_out(splits):
    train, test = splits
    assert len(train.labels) + len(test.labels) == 1797 and len(test.labels) == 450
    assert train.images.shape == (1347, 3, digits.IMG_SIZE, digits.IMG_SIZE) and train.labels.dtype == torch.int64
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(digits.CLASSES))
    seen = {image.tobytes() for image in train.pixels}
    assert not any(image.tobytes() in seen for image in test.pixels)


def test_images_are_what_the_processor_makes_of_the_pixels(splits):
    test = splits[1]
    rgb = np.repeat(test.pixels[0][..., None], 3, axis=-1)
    assert torch.equal(digits.image_processor()(rgb, return_tensors="pt").pixel_values[0], test.images[0])
    assert test.images.min() == -1 and test.images.max() == 1


def test_the_same_seed_gives_the_same_batches(splits):
    def first(seed, count=3):
        return list(itertools.islice(digits.batches(splits[1], 100, seed), count))

    for (images, labels), (images_again, labels_again) in zip(first(0), first(0), strict=True):
        assert images.shape == (100, 3, digits.IMG_SIZE, digits.IMG_SIZE)
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
    assert not torch.equal(first(0)[0][1], first(1)[0][1])


def test_an_epoch_shows_each_digit_once(splits):
    test = splits[1]
    epoch = list(itertools.islice(digits.batches(test, 150, seed=0), 3))
    assert torch.equal(torch.cat([labels for _, labels in epoch]).bincount(), test.labels.bincount())


def test_training_digits_vary_within_bounds_on_black():
    images = torch.full((100, 3, digits.IMG_SIZE, digits.IMG_SIZE), -1.0)
    images[:, :, 6:10, 6:10] = 1.0
    varied = digits._varied(images, torch.Generator().manual_seed(0))
    assert varied.shape == images.shape and varied.min() == -1 and varied.max() <= 1
    light = (varied + 1).sum(dim=(1, 2, 3)) / (images + 1).sum(dim=(1, 2, 3))
    least, most = (1 - digits.STRETCH) ** 2, (1 + digits.STRETCH) ** 2
    assert 0.95 / most < light.min() < 1 < light.max() < 1.05 / least
    assert len({image.numpy().tobytes() for image in varied}) == 100


def test_a_digit_that_does_not_vary_stays(splits, monkeypatch):
    for name in ("TURN", "STRETCH", "MOVE"):
        monkeypatch.setattr(digits, name, 0.0)
    images = splits[1].images[:4]
    torch.testing.assert_close(digits._varied(images, torch.Generator()), images, atol=1e-5, rtol=0)


def test_the_teacher_tells_the_classes_apart():
    logits = conv_net(7)(torch.randn(2, 3, digits.IMG_SIZE, digits.IMG_SIZE))
    assert logits.shape == (2, 7)
