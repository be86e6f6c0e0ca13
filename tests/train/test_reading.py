"""Corrupt samples are counted, named and left out; readable ones are decoded once, as `predict` decodes them."""

import errno
import gc
import io
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from deit_fast.data import load_image
from deit_fast.train import reading, recipe, samples
from tests.train.test_samples import CONFIG, folders


@pytest.fixture
def root(tmp_path):
    """Five images a class, of which the second of class a is cut off."""
    made = folders(tmp_path / "images", images=5)
    for split in ("train", "val"):
        cut(made / split / "a" / "1.png")
    return made


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[:200])


def augmented(root, allowed: int = 1) -> samples.Augmented:
    return samples.Augmented(samples.open_data(str(root)).train, transforms.ToTensor(), seed=0, allowed=allowed)


def test_the_next_sample_stands_in_for_a_corrupt_one(root):
    made = augmented(root)
    image, target, corrupt = made[0, 7, 1]
    expected, of, none = made[0, 7, 2]
    assert torch.equal(image, expected) and target == of == 0 and none == {}
    (why,) = corrupt.values()
    assert list(corrupt) == ["a/1.png"] and "cannot be decoded" in why
    cut(root / "train" / "c" / "4.png")
    assert made[0, 8, 14][0] is None  # a second corrupt one, where one is allowed
    assert torch.equal(augmented(root, allowed=2)[0, 9, 14][0], made[0, 9, 0][0])  # from the end to the beginning


def test_an_image_that_comes_several_times_is_decoded_once(root, monkeypatch):
    decoded = []
    decode = reading.decode
    monkeypatch.setattr(reading, "decode", lambda name, file: decoded.append(name) or decode(name, file))
    order = samples.Order(15, 12, seed=0, repeated=True)
    made = augmented(root)
    (keys,) = order
    items = [made[key] for key in keys]
    assert len({index for _, _, index in keys}) == 4
    # The corrupt one takes another reading.
    assert len(decoded) == 4 + any(corrupt for _, _, corrupt in items)
    whole = {
        index: made.transform(load_image(made.dataset.reader.samples[index][0])) for _, _, index in keys if index != 1
    }
    assert all(torch.equal(item[0], whole[key[2]]) for key, item in zip(keys, items, strict=True) if key[2] != 1)


def test_an_evaluation_leaves_corrupt_images_out(root):
    val = samples.open_data(str(root)).val
    loader = samples.val_loader(val, samples.eval_transform(CONFIG), 1, range(4), 0, max_corrupt=0.1)
    assert [len(targets) for _, targets in loader] == [1, 1, 1]
    assert list(loader.gather()) == ["a/1.png"] and loader.gather() == {} and list(loader.corrupt) == ["a/1.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_the_share_stop_with_their_number_and_the_first(root, workers):
    for name in ("a/3", "b/0", "b/1", "b/2"):
        cut(root / "val" / f"{name}.png")
    val = samples.open_data(str(root)).val
    loader = samples.val_loader(val, samples.eval_transform(CONFIG), 4, range(15), workers, max_corrupt=0.27)
    with pytest.raises(
        OSError, match=r"5 of 15 images can't be read, a/1.png \(.*, a/3.png \(.*, b/0.png \(.*, …"
    ) as error:
        list(loader)
    assert "worker" not in str(error.value)
    del loader, error
    gc.collect()  # ends the workers, which those of another test would inherit


def test_an_evaluation_of_nothing_that_can_be_read_is_an_error(root):
    for file in (root / "val").rglob("*.png"):
        cut(file)
    val = samples.open_data(str(root)).val
    with pytest.raises(OSError, match="15 of 15 images can't be read"):
        list(samples.val_loader(val, samples.eval_transform(CONFIG), 4, range(15), 0, max_corrupt=1.0))


class _Failing(io.BytesIO):
    """A file that the file system can't read on."""

    def read(self, *_):
        raise OSError(errno.EIO, "Input/output error")


def failing(monkeypatch, reader, times: int, opens: bool) -> None:
    """Let the file system fail `times` times at sample 2: when it is opened, or when it is read."""
    left, item = [None] * times, type(reader).__getitem__

    def fails(self, index):
        if index != 2 or not left:
            return item(self, index)
        left.pop()
        if opens:
            return _Failing(), 0
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(type(reader), "__getitem__", fails)
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0))


@pytest.mark.parametrize("opens", [False, True])
def test_an_image_that_the_file_system_gives_in_the_end_is_not_corrupt(root, monkeypatch, opens):
    made, expected = augmented(root), augmented(root)[0, 0, 2]
    failing(monkeypatch, made.dataset.reader, 2, opens)
    image, target, corrupt = made[0, 0, 2]
    assert torch.equal(image, expected[0]) and target == expected[1] and corrupt == {}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_system_that_keeps_failing_stops_the_run_and_not_the_image(root, monkeypatch, workers):
    val = samples.open_data(str(root)).val
    failing(monkeypatch, val.reader, 100, True)
    loader = samples.val_loader(val, samples.eval_transform(CONFIG), 4, range(15), workers, max_corrupt=1.0)
    with pytest.raises(OSError, match=r"^a/2.png could not be read in 3 tries: .*Input/output error$") as error:
        list(loader)
    assert not loader.corrupt and not loader.new
    del loader, error
    gc.collect()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_system_that_is_dead_is_tried_with_one_image(root, monkeypatch, split, workers):
    data, tried = samples.open_data(str(root)), multiprocessing.get_context("fork").Value("i", 0)

    def dead(*_):
        tried.value += 1
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(type(data.train.reader), "__getitem__", dead)
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0))
    if split == "train":
        order = samples.Order(15, 4, seed=0, repeated=False)
        loader = samples.train_loader(data, order, recipe.load(), CONFIG, workers, max_corrupt=0.5)
    else:
        loader = samples.val_loader(data.val, samples.eval_transform(CONFIG), 4, range(15), workers, max_corrupt=0.5)
    with pytest.raises(OSError, match=r"^./..png could not be read in 3 tries: .*Input/output error$") as error:
        list(loader)
    assert tried.value == 3 and not loader.corrupt and not loader.new
    del loader, error
    gc.collect()


@pytest.mark.parametrize("error", [TimeoutError("timed out"), ConnectionResetError("reset by peer")])
def test_an_error_of_a_network_makes_no_image_corrupt_without_a_number_either(root, monkeypatch, error):
    made = augmented(root)
    monkeypatch.setattr(reading, "PAUSES", (0.0,))
    monkeypatch.setattr(type(made.dataset.reader), "__getitem__", lambda *_: _raise(error))
    assert made[0, 0, 2] == (None, None, {"a/2.png": error})


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("gone", [FileNotFoundError, PermissionError])
def test_a_file_that_is_not_there_or_not_ours_is_corrupt_at_once(root, monkeypatch, gone):
    made = augmented(root)
    monkeypatch.setattr(reading, "PAUSES", (1e9,))
    monkeypatch.setattr(reading, "decode", lambda *_: _raise(gone(errno.ENOENT, "gone")))
    assert list(reading.read(made.dataset, 2)[2]) == ["a/2.png"]


def test_what_other_processes_found_counts(root, monkeypatch):
    val = samples.open_data(str(root)).val
    loader = samples.val_loader(val, samples.eval_transform(CONFIG), 4, range(15), 0, max_corrupt=0.1)
    list(loader)
    monkeypatch.setattr(reading, "gather_object", lambda mine: [*mine, ("b/0.png", "gone")])
    assert sorted(loader.gather()) == ["a/1.png", "b/0.png"]
    with pytest.raises(OSError, match="2 of 15"):
        loader.check()


def test_images_come_as_predict_has_them(tmp_path):
    root = folders(tmp_path)
    folder = root / "train" / "a"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "2.jpg", exif=exif)
    image.convert("CMYK").save(folder / "3.jpg")
    image.quantize(16).save(folder / "4.png", transparency=bytes([0] * 16))
    Image.fromarray(np.linspace(0, 65535, 96, dtype=np.uint16).reshape(8, 12)).save(folder / "5.tif")
    made = augmented(root)
    for index, name in enumerate(("2.jpg", "3.jpg", "4.png", "5.tif"), start=2):
        assert torch.equal(made[0, 0, index][0], transforms.ToTensor()(load_image(folder / name))), name
