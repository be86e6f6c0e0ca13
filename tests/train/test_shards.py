"""Tar files by index: which are a split's, what is a sample, and what its class is."""

import gc
import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deit_fast.train import recipe, samples, shards
from deit_fast.train.shards import ReaderShards
from tests.train.test_samples import CONFIG, folders


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (12, 12), value).save(file, "PNG")
    return file.getvalue()


def write(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def read(dataset) -> list[tuple[int, int]]:
    """The grey of each image, and its class."""
    return [
        (Image.open(file).getpixel((0, 0)), target)
        for file, target in map(dataset.reader.__getitem__, range(len(dataset)))
    ]


FOLDERS = {"a/1.png": png(1), "b/2.JPEG": png(2), "b/._3.png": b"of a Mac", "notes.txt": b""}
NUMBERS = {"0.png": png(1), "0.cls": b"0", "1.json": b"{}", "1.cls": b"2\n", "1.png": png(2)}


def test_a_folder_in_a_tar_is_a_class(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / split / "0.tar", FOLDERS)
        write(tmp_path / split / "10.tar", {"c/9.png": png(9)})
        write(tmp_path / split / "9.tar", {"./deep/a/8.png": png(8)})
    data = samples.open_data(str(tmp_path))
    assert read(data.train) == [(1, 0), (2, 1), (8, 0), (9, 2)] == read(data.val) and data.num_classes == 3
    assert data.train.filename(2) == "9.tar/deep/a/8.png"


def test_tars_beside_each_other_are_told_apart_by_their_names(tmp_path):
    write(tmp_path / "set-train-0.tar", FOLDERS)
    write(tmp_path / "set-validation.tar", {"b/5.png": png(5)})
    data = samples.open_data(str(tmp_path))
    assert read(data.train) == [(1, 0), (2, 1)] and read(data.val) == [(5, 1)]
    val, num_classes = samples.open_val(str(tmp_path))
    assert read(val) == [(5, 1)] and num_classes == 2
    assert len(samples.open_val(str(tmp_path / "set-validation.tar"))[0]) == 1
    with pytest.raises(ValueError, match=r"0\.png has no class"):
        samples.open_val(str(write(tmp_path / "one.tar", {"0.png": png(0)})))
    with pytest.raises(FileNotFoundError, match="no folder"):
        samples.open_val(str(tmp_path / "none.tar"))


def test_a_tar_a_class_and_tars_in_a_tar(tmp_path):
    inner = write(tmp_path / "n2.tar", {"x.png": png(7), "y.png": png(8)}).read_bytes()
    write(tmp_path / "train" / "n1.tar", {"x.png": png(3)})
    write(tmp_path / "train" / "n2.tar", {"x.png": png(4)})
    write(tmp_path / "val.tar", {"n1.tar": write(tmp_path / "n1.tar", {"x.png": png(6)}).read_bytes(), "n2.tar": inner})
    data = samples.open_data(str(tmp_path))
    assert read(data.train) == [(3, 0), (4, 1)] and read(data.val) == [(6, 0), (7, 1), (8, 1)]


def test_classes_beside_the_images_are_numbers_as_webdataset_has_them(tmp_path):
    write(tmp_path / "train-0.tar", NUMBERS)
    write(tmp_path / "val-0.tar", {"0.png": png(5), "0.cls": b"1"})
    data = samples.open_data(str(tmp_path))
    assert read(data.train) == [(1, 0), (2, 2)] and read(data.val) == [(5, 1)] and data.num_classes == 3
    assert samples.open_data(str(tmp_path), num_classes=5).num_classes == 5  # the last have no images here
    with pytest.raises(ValueError, match="has 3 classes, not 2"):
        samples.open_data(str(tmp_path), num_classes=2)
    write(tmp_path / "val-1.tar", {"0.png": png(5), "0.cls": b"3"})
    with pytest.raises(ValueError, match="one numbered 3"):
        samples.open_data(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": png(0)}, "0.png has no class"),
        ({"0.png": png(0), "0.json": b"{}"}, "0.png has no class"),
        (NUMBERS | {"2.png": png(0)}, "2.png has no class"),
        (NUMBERS | {"0.cls": b"cat"}, "train-0.tar can't be read: .*cat"),
        ({"0.txt": b""}, "no images"),
    ],
)
def test_tars_that_do_not_say_the_classes_are_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        ReaderShards([write(tmp_path / "train-0.tar", files)], named=False)


def test_tars_that_can_not_be_read_by_index_are_refused(tmp_path):
    tar = write(tmp_path / "train" / "a.tar", FOLDERS)
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"a\.tar can't be read: unexpected end"):
        ReaderShards([tar], named=True)
    (tar.parent / "b").mkdir()
    with pytest.raises(ValueError, match="both tar files and folders"):
        shards.find(tmp_path, "train")
    (tar.parent / "b.tar.gz").touch()
    with pytest.raises(ValueError, match=r"b\.tar\.gz is compressed"):
        shards.find(tmp_path, "train")


def test_workers_forked_from_a_process_that_reads_get_their_own_samples(tmp_path):
    values = np.random.default_rng(0).permutation(200).tolist()
    for split in ("train", "val"):
        write(tmp_path / split / "0.tar", {f"{value % 3}/{value:03}.png": png(value) for value in values})
    data = samples.open_data(str(tmp_path))
    loader = samples.val_loader(data.val, samples.eval_transform(CONFIG), 8, range(200), workers=2)
    with ThreadPoolExecutor() as threads:
        threads.map(data.val.reader.__getitem__, range(200))
        found = [(byte_images.images[:, 0, 0, 0], targets) for byte_images, targets in loader]
    del loader
    gc.collect()  # ends the workers, which those of another test would inherit
    first, targets = map(torch.cat, zip(*found, strict=True))
    assert first.tolist() == values and targets.tolist() == [v % 3 for v in values]


def test_a_stream_is_refused_and_told_how_it_is_read(tmp_path):
    with pytest.raises(ValueError, match="read by index without --data-set"):
        samples.open_data(str(tmp_path), "wds/any")


def test_samples_are_those_of_the_folders_in_the_same_order(tmp_path):
    root = folders(tmp_path / "folders")
    for split in ("train", "val"):
        files = {
            str(file.relative_to(root / split)): file.read_bytes() for file in sorted((root / split).rglob("*.png"))
        }
        write(tmp_path / "tars" / f"{split}.tar", files)
    both = [samples.open_data(str(tmp_path / name)) for name in ("folders", "tars")]
    transform = samples.train_transform(recipe.load(), CONFIG)
    of_folders, of_tars = (samples.Augmented(data.train, transform, seed=0) for data in both)
    for index in range(len(both[0].train)):
        expected, found = of_folders[0, index, index], of_tars[0, index, index]
        assert all(map(torch.equal, expected[0], found[0])) and expected[1] == found[1]
