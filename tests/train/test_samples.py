"""The order of the samples, and what makes every draw repeatable."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from deit_fast.train import recipe, samples
from deit_fast.train.pixels import Normalise, batched
from deit_fast.train.samples import Order

CONFIG = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}


def folders(root, train=("a", "b", "c"), val=("a", "b", "c"), images: int = 2):
    for split, classes in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def drawn() -> tuple:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_draws_follow_from_the_key_alone():
    samples.seed_draws("sample", 0, 1, 2)
    first = drawn()
    samples.seed_draws("sample", 0, 1, 3)
    assert drawn() != first
    samples.seed_draws("sample", 0, 1, 2)
    assert drawn() == first


def test_an_epoch_begun_in_its_middle_goes_on_as_the_whole_one():
    order = Order(50, 8, seed=0, repeated=False)
    whole = list(order)
    order.start = 4
    assert list(order) == whole[4:] and len(order) == 2 and order.steps == 6
    order.epoch, order.start = 1, 0
    assert [key[2] for batch in order for key in batch] != [key[2] for batch in whole for key in batch]


def test_each_image_comes_once_or_with_repeated_augmentation_three_times():
    once = [key[2] for batch in Order(48, 8, seed=0, repeated=False) for key in batch]
    thrice = [key for batch in Order(48, 8, seed=0, repeated=True) for key in batch]
    assert sorted(once) == list(range(48))
    assert sorted(np.unique([index for _, _, index in thrice], return_counts=True)[1]) == [3] * 16
    assert len({at for _, at, _ in thrice}) == 48  # each is augmented by a position of its own


def test_the_parts_of_a_batch_hold_it_and_mix_what_it_mixes():
    (whole,) = Order(8, 8, seed=0, repeated=False)
    parts = list(Order(8, 8, seed=0, repeated=False, parts=2))
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    pairs = set(zip(whole, reversed(whole), strict=True))
    for number, part in enumerate(parts):
        assert set(zip(part, reversed(part), strict=True)) <= pairs
        assert list(Order(8, 8, seed=0, repeated=False, parts=2, mine=range(number, number + 1))) == [part]


@pytest.mark.parametrize(("size", "parts", "message"), [(4, 1, "don't fill"), (8, 3, "can't be cut")])
def test_batches_that_can_not_be_made_are_refused(size, parts, message):
    with pytest.raises(ValueError, match=message):
        Order(size, 8, seed=0, repeated=False, parts=parts)


@pytest.mark.parametrize("name", recipe.recipes())
def test_a_sample_is_the_same_whatever_was_drawn_before(tmp_path, name):
    data = samples.open_data(str(folders(tmp_path)))
    made = samples.Augmented(data.train, samples.train_transform(recipe.load(name), CONFIG), seed=0)
    byte_images, label, _ = made[0, 3, 1]
    made[0, 4, 1]
    random.random()
    again = made[0, 3, 1][0]
    assert all(map(torch.equal, [t for t in byte_images if t is not None], [t for t in again if t is not None]))
    assert byte_images.images.shape == (3, 16, 16) and byte_images.images.dtype is torch.uint8 and label == 0
    assert not torch.equal(byte_images.images, made[1, 3, 1][0].images)


@pytest.mark.parametrize("reprob", [0.0, 1.0])
def test_the_transform_is_timms(reprob):
    deit = recipe.load(reprob=reprob, color_jitter=None)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    timms = create_transform(
        (3, 16, 16), is_training=True, auto_augment=deit.aa, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3,
        re_prob=reprob, re_mode="pixel",
    )  # fmt: skip
    samples.seed_draws(1)
    expected = timms(image)
    samples.seed_draws(1)
    byte_images = batched([samples.train_transform(deit, CONFIG)(image)])
    assert torch.equal(Normalise(CONFIG, torch.device("cpu"))(byte_images)[0], expected)
    evaluated = create_transform((3, 16, 16), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    byte_images = batched([samples.eval_transform(CONFIG)(image)])
    assert torch.equal(Normalise(CONFIG, torch.device("cpu"))(byte_images)[0], evaluated(image))


def test_a_strong_randaugment_may_keep_no_bit():
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    assert samples._posterize(image, 0).getextrema() == ((0, 0),) * 3
    assert samples._posterize(image, 1).getextrema() == ((128, 128), (0, 0), (0, 0))


# -- folders


def test_a_class_without_validation_images_keeps_its_number(tmp_path):
    data = samples.open_data(str(folders(tmp_path, val=("a", "c"))))
    assert data.num_classes == 3 and sorted({data.val[index][1] for index in range(len(data.val))}) == [0, 2]
    val, num_classes = samples.open_val(str(tmp_path))
    assert num_classes == 3 and len(val) == 4


def test_folders_that_can_not_be_trained_on_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        samples.open_data(str(tmp_path / "none"))
    (tmp_path / "empty" / "train" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no images"):
        samples.open_data(str(tmp_path / "empty"))
    root = folders(tmp_path / "flat", val=())
    with pytest.raises(ValueError, match="needs two folders"):
        samples.open_data(str(root / "train"))
    with pytest.raises(ValueError, match="has 3 classes, not 5"):
        samples.open_data(str(folders(tmp_path / "three")), num_classes=5)


def test_a_class_that_would_be_left_out_or_shift_the_others_is_refused(tmp_path):
    root = folders(tmp_path, val=("a", "b", "c", "d"))
    with pytest.raises(ValueError, match="no training images of a class to be evaluated on: d"):
        samples.open_data(str(root))
    (root / "train" / "d").mkdir()
    with pytest.raises(ValueError, match=r"train/d has no images"):
        samples.open_data(str(root))
    (root / "train" / "d" / "deeper").mkdir()
    Image.new("RGB", (4, 4)).save(root / "train" / "d" / "deeper" / "0.webp")
    with pytest.raises(ValueError, match="evaluated on: d"):  # timm's classes are the innermost folders
        samples.open_data(str(root))
    Image.new("RGB", (4, 4)).save(root / "train" / "d" / "0.bmp")
    (root / "train" / ".cache").mkdir()
    (root / "val" / "a" / "0.png").unlink()
    assert samples.open_data(str(root)).num_classes == 5
    Image.new("RGB", (4, 4)).save(root / "train" / "stray.png")
    with pytest.raises(ValueError, match="train has images that are in no class's folder"):
        samples.open_data(str(root))
