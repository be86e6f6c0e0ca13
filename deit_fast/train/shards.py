"""Images in tar files, read by their index: a run on them can go on from any sample."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

# As timm has them.
FOLDERS = {"train": ("train", "training"), "validation": ("val", "valid", "validation", "eval", "evaluation")}
PACKED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Member(NamedTuple):
    """A file in a tar: its path there, below the names of the tars that hold it, and where its bytes are."""

    path: Path
    start: int
    size: int


class ReaderShards(Reader):
    """Samples in the order of `tars` and of their members; those of tars in a tar too.

    As WebDataset has it, the class of `key.jpg` is the number in `key.cls`: `num_classes` is one more than the largest,
    and `class_to_idx` is empty. Tars without such files have a folder a class, or, where `named`, are named by the
    class of what is in no folder: `class_to_idx` are these names, in timm's order, or as it is given.

    Raises:
        ValueError: not a tar file that can be read by index, an image without a class, or of one that is not given.
    """

    def __init__(self, tars: list[Path], named: bool, class_to_idx: dict[str, int] | None = None):
        super().__init__()
        self.root = tars
        self.names: list[str] = []
        labels: list[str | int] = []
        places: list[tuple[int, int, int]] = []
        for number, tar in enumerate(tars):
            for image, label in _labelled(tar, named):
                self.names.append(str(image.path))
                labels.append(label)
                places.append((number, image.start, image.size))
        if not labels:
            raise ValueError(f"{tars[0].parent} has no images in its tar files")
        # Arrays, since workers would copy the pages of a list's many objects.
        self.places = np.array(places, dtype=np.int64)
        self.class_to_idx: dict[str, int] = {}
        self.num_classes = 0
        numbers = [label for label in labels if isinstance(label, int)]
        if numbers and (class_to_idx or len(numbers) < len(labels) or min(numbers) < 0):
            raise ValueError(f"{tars[0].parent} has classes as numbers in .cls files, and others that go with none")
        if numbers:
            self.targets = np.array(numbers, dtype=np.int64)
            self.num_classes = 1 + max(numbers)
            return
        found = sorted({str(label) for label in labels}, key=natural_key)
        self.class_to_idx = class_to_idx or {name: number for number, name in enumerate(found)}
        self.targets = np.array([self.class_to_idx[str(label)] for label in labels], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        number, start, size = self.places[index].tolist()
        # Opened anew, as a file of a folder is: a handle shared with a forked worker has one position for both.
        with self.root[number].open("rb") as tar:
            tar.seek(start)
            return io.BytesIO(tar.read(size)), int(self.targets[index])

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return os.path.basename(self.names[index]) if basename else self.names[index]


def find(path: Path, split: str) -> list[Path]:
    """The tar files of a split of `FOLDERS`: in its folder, or beside each other with "train" or "val" in their names.

    Raises:
        ValueError: they are compressed, or there are folders beside them.
    """
    if path.is_file():
        return [path]
    folder = next((path / name for name in FOLDERS[split] if (path / name).is_dir()), None)
    files = list((folder or path).iterdir())
    if folder is None:
        files = [file for file in files if file.is_file() and FOLDERS[split][0] in file.name]
    packed = [file for file in files if file.name.endswith(PACKED)]
    if packed:
        raise ValueError(f"{packed[0]} is compressed, and can't be read by index: unpack it to a plain .tar")
    tars = sorted((file for file in files if file.suffix == ".tar"), key=lambda file: natural_key(file.name))
    folders = [file for file in files if file.is_dir()]
    if tars and folders:
        raise ValueError(f"there are both tar files and folders: {tars[0]} and {folders[0]}")
    return tars


def _labelled(tar: Path, named: bool) -> Iterator[tuple[Member, str | int]]:
    """The images of a tar file with their classes."""
    images, numbers, beside = [], {}, set()
    try:
        with tar.open("rb") as file:
            for member in _members(file, Path(tar.name)):
                key = member.path.with_suffix("")
                if member.path.suffix.lower() in IMG_EXTENSIONS:
                    images.append(member)
                elif member.path.suffix == ".cls":
                    file.seek(member.start)
                    numbers[key] = int(file.read(member.size))
                else:
                    beside.add(key)
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{tar} can't be read: {error}") from error
    for image in images:
        key, holder = image.path.with_suffix(""), image.path.parent
        if key in numbers:
            yield image, numbers[key]
        elif numbers or (holder.suffix == ".tar" and (key in beside or (holder.name == tar.name and not named))):
            raise ValueError(f"{tar}: {image.path} has no class, neither in a .cls file beside it nor by a folder")
        else:
            yield image, holder.name.removesuffix(".tar")


def _members(file: Any, path: Path, offset: int = 0) -> Iterator[Member]:
    tar: Any = tarfile.TarFile(fileobj=file)
    for member in iter(tar.next, None):
        tar.members.clear()  # it would keep them all
        start = offset + member.offset_data
        if not member.isfile() or Path(member.name).name.startswith("."):
            continue
        if member.name.endswith(".tar"):
            yield from _members(tar.extractfile(member), path / member.name, start)
        else:
            yield Member(path / member.name, start, member.size)
