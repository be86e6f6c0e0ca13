"""Images for training and evaluation from timm's readers, every draw a function of seed, epoch and position alone.

So a run that begins anywhere in an epoch, with any number of workers, sees what an uninterrupted one sees there.
"""

import hashlib
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, auto_augment, create_dataset, create_transform
from torch.utils.data import Dataset, Sampler
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

from deit_fast.train import shards
from deit_fast.train.loader import Loader
from deit_fast.train.pixels import ToBytes
from deit_fast.train.reading import Batches, Item, allowed, collate, read
from deit_fast.train.recipe import Recipe

REPEATS = 3
STREAMS = ("wds/", "tfds/", "hfids/")
# Of epoch, position in the epoch's order, and sample.
Key = tuple[int, int, int]


class Data(NamedTuple):
    """Samples to learn from, samples to be evaluated on, and how many classes there are.

    train, val: datasets by index, with a length, which torch's type doesn't promise.
    """

    train: Any
    val: Any
    num_classes: int


def seed_draws(*key: str | int) -> None:
    """Let the next draws of Python, numpy and torch (on the CPU and the current GPU) follow from `key` alone."""
    number = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    random.seed(number)
    np.random.seed(number % 2**32)
    # Not torch.manual_seed: where CUDA is unused it formats a stack trace each time, and keeps it.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


def open_data(path: str, name: str = "", num_classes: int | None = None) -> Data:
    """The training and validation samples below `path`, without transforms.

    name: of timm's `create_dataset`: "" for a folder with `train` and `val` (or `validation`) inside, each of one
    folder a class, or of tar files (`deit_fast.train.shards`), "hfds/…" for Hugging Face datasets, "torch/…" for
    torchvision's.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: samples that can't be taken by their index, one folder for both, or classes that don't add up.
    """
    train = _open(path, name, "train")
    val = _open(path, name, "validation")
    if not name and train.reader.root == val.reader.root:
        raise ValueError(f"{path} needs two folders, train and val: its images would be both trained and evaluated on")
    classes = _classes(train)
    unknown = [label for label in _classes(val) if label not in classes]
    if unknown:
        raise ValueError(f"{path} has no training images of a class to be evaluated on: {', '.join(unknown)}")
    if classes != _classes(val) and not name:
        # The classes of training: one that has no image to be evaluated on would shift the others' numbers.
        val = _open(path, name, "validation", classes)
    found = len(classes) or max(num_classes or 0, _numbered(train))
    if not found:
        raise ValueError(f"{name} does not say how many classes it has: give --nb-classes")
    if num_classes is not None and num_classes != found:
        raise ValueError(f"{path} has {found} classes, not {num_classes}")
    if _numbered(val) > found:
        raise ValueError(f"{path} has {found} classes, and one numbered {_numbered(val) - 1} to be evaluated on")
    return Data(train, val, found)


def fingerprint(data: Data, name: str, path: str) -> str:
    """Of the training samples: the files' names; of a data set by `name`, its own, or where it is and its length."""
    reader = getattr(data.train, "reader", None)
    if name:
        return f"{name}, {getattr(getattr(reader, 'dataset', None), '_fingerprint', path)}, {len(data.train)}"
    return hashlib.blake2b("\n".join(data.train.filenames()).encode(), digest_size=16).hexdigest()


def open_val(path: str, name: str = "") -> tuple[Any, int | None]:
    """The validation samples alone, and how many classes there are, where that is known."""
    val = _open(path, name, "validation")
    folder = not name and Path(path).is_dir() and not _numbered(val)
    if folder and ((Path(path) / "train").is_dir() or shards.find(Path(path), "train")):
        return open_data(path)[1:]
    return val, len(_classes(val)) or None


def _classes(dataset: Any) -> dict[str, int]:
    return getattr(getattr(dataset, "reader", dataset), "class_to_idx", {})


def _numbered(dataset: Any) -> int:
    """One more than the largest class, of samples whose classes have numbers and no names; else 0."""
    return getattr(getattr(dataset, "reader", None), "num_classes", 0)


def _open(path: str, name: str, split: str, classes: dict[str, int] | None = None) -> Any:
    if name:
        if name.lower().startswith(STREAMS):
            raise ValueError(
                f"{name} is read as a stream: a run on it could not be resumed where it stopped. "
                "Tar files, WebDataset's too, are read by index without --data-set"
            )
        return create_dataset(name, root=path, split=split)
    root = Path(path)
    if not root.is_dir() and not (root.is_file() and root.suffix == ".tar"):
        raise FileNotFoundError(f"there is no folder {path}")
    tars = shards.find(root, split)
    if tars:
        return ImageDataset(path, reader=shards.ReaderShards(tars, tars[0].parent.parent == root, classes))
    try:
        # Of whatever Pillow reads; timm alone would leave some out in silence.
        options: Any = {"class_map": classes, "input_key": ";".join(IMG_EXTENSIONS)}
        dataset = create_dataset("", root=path, split=split, **options)
    except RuntimeError as error:  # timm's, where a folder has no images
        raise FileNotFoundError(f"no images to be found for {split} in {path}: {error}") from error
    _check_folders(dataset.reader, split)
    return dataset


def _check_folders(reader: Any, split: str) -> None:
    """Refuse what would shift the numbers of the classes, or leave one out in silence."""
    if "" in reader.class_to_idx:
        raise ValueError(f"{reader.root} has images that are in no class's folder")
    folders = [file for file in os.scandir(reader.root) if file.is_dir() and not file.name.startswith(".")]
    for folder in folders:
        inside = (file.startswith(folder.path + os.sep) for file, _ in reader.samples)
        if split == "train" and folder.name not in reader.class_to_idx and not any(inside):
            raise ValueError(f"{folder.path} has no images, and would be no class: fill it or take it away")


def train_transform(recipe: Recipe, data_config: dict[str, Any]) -> transforms.Compose:
    """timm's, as the recipe has it, to `ByteImages`. data_config: of `timm.data.resolve_model_data_config`."""
    size = data_config["input_size"]
    parts: Any = create_transform(
        size,
        is_training=True,
        scale=recipe.scale,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter or 0.0,
        auto_augment=recipe.aa,
        interpolation=recipe.train_interpolation,
        mean=data_config["mean"],
        std=data_config["std"],
        re_prob=recipe.reprob,
        re_mode=recipe.remode,
        re_count=recipe.recount,
        separate=True,
    )
    for step in parts[1].transforms:
        for augment in getattr(step, "ops", ()):
            if augment.aug_fn is auto_augment.posterize:
                augment.aug_fn = _posterize
    crop = _simple_random_crop(recipe, size[-1]) if recipe.src else parts[0]
    _, _, *erasing = parts[2].transforms  # after ToTensor and Normalize
    return transforms.Compose([crop, parts[1], ToBytes(*erasing)])


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's. Of a strong RandAugment it keeps 0 bits: black, which Pillow 13 refuses to make."""
    return auto_augment.posterize(image, bits, **options) if bits > 0 else image.point(lambda _: 0)


def _simple_random_crop(recipe: Recipe, size: int) -> transforms.Compose:
    """DeiT III's, which timm lacks: the shorter side to `size`, a reflected margin of 4, and a square of it."""
    resize = transforms.Resize(size, transforms.InterpolationMode(recipe.train_interpolation))
    crop = transforms.RandomCrop(size, padding=4, padding_mode="reflect")
    return transforms.Compose([resize, crop, transforms.RandomHorizontalFlip(recipe.hflip)])


def eval_transform(data_config: dict[str, Any]) -> transforms.Compose:
    """timm's, to `ByteImages`: the shorter side to size / crop_pct, and the centre of it."""
    names = ("interpolation", "mean", "std", "crop_pct")
    timms: Any = create_transform(data_config["input_size"], **{name: data_config[name] for name in names})
    return transforms.Compose([*timms.transforms[:-2], ToBytes()])


class Order(Sampler[list[Key]]):
    """What the batches of an epoch hold, a list of keys a batch; set `epoch` and `start` before each pass.

    A step's batch is cut into `parts` (processes times accumulated batches) that hold as many images each, and this
    process takes those numbered `mine`. Mixup pairs the images of a batch from its two ends inwards: a part holds
    both of each pair, so that the parts mix what the whole would.
    """

    def __init__(
        self, samples: int, batch_size: int, seed: int, repeated: bool, parts: int = 1, mine: range | None = None
    ):
        if samples < batch_size:
            raise ValueError(f"{samples} training images don't fill a batch of {batch_size}")
        if batch_size % (2 * parts) and parts > 1:
            raise ValueError(f"a batch of {batch_size} can't be cut into {parts} parts of an even number of images")
        self.samples, self.batch_size, self.seed, self.repeated = samples, batch_size, seed, repeated
        self.parts, self.mine = parts, range(parts) if mine is None else mine
        self.steps = samples // batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return (self.steps - self.start) * len(self.mine)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self._order()
        for step in range(self.start, self.steps):
            first = step * self.batch_size
            for part in self.mine:
                yield [(epoch, at, order[at]) for at in self._part(part, first)]

    def _order(self) -> list[int]:
        seed_draws("order", self.seed, self.epoch)
        order = torch.randperm(self.samples)
        return (order.repeat_interleave(REPEATS)[: self.samples] if self.repeated else order).tolist()

    def _part(self, part: int, first: int) -> list[int]:
        if self.parts == 1:
            return list(range(first, first + self.batch_size))
        half = self.batch_size // self.parts // 2
        last = first + self.batch_size
        start, end = first + part * half, last - part * half
        return [*range(start, start + half), *range(end - half, end)]


class _Items(Dataset):
    """Samples of a dataset. After an error of the file system that remains nothing more is read: the run is to stop."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.failed: Item | None = None

    def _item(self, index: int) -> Item:
        if self.failed is not None:
            return self.failed
        item = read(self.dataset, index)
        if any(isinstance(why, OSError) for why in item[2].values()):
            self.failed = item
        return item


class Augmented(_Items):
    """Readable samples of a dataset, augmented, asked for by `Key`.

    In place of a corrupt one comes the next in the dataset's order. Where more than `allowed` were found corrupt here,
    none does.
    """

    def __init__(self, dataset: Any, transform: transforms.Compose, seed: int, allowed: int = 0):
        super().__init__(dataset)
        self.transform, self.seed, self.allowed = transform, seed, allowed
        self.corrupt: dict[str, str] = {}
        self.last: tuple[int, Any] = -1, None

    def __getitem__(self, key: Key) -> Item:
        epoch, position, index = key
        # With repeated augmentation the same image comes several times in a row, and is decoded once.
        if self.last[0] != index:
            self.last = index, self._readable(index)
        image, target, corrupt = self.last[1]
        if image is None:
            return self.last[1]
        seed_draws("sample", self.seed, epoch, position)
        return self.transform(image), target, corrupt

    def _readable(self, index: int) -> Item:
        corrupt: dict[str, str] = {}
        while True:
            image, target, why = self._item(index)
            if self.failed is not None:
                return self.failed
            if image is not None:
                return image, target, corrupt
            corrupt |= why
            self.corrupt |= why
            if len(self.corrupt) > self.allowed:
                return None, target, self.corrupt
            index = (index + 1) % len(self.dataset)


class Shown(_Items):
    """Samples of a dataset for evaluation."""

    def __init__(self, dataset: Any, transform: transforms.Compose):
        super().__init__(dataset)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        image, target, corrupt = self._item(index)
        return image if image is None else self.transform(image), target, corrupt


def train_loader(
    data: Data, order: Order, recipe: Recipe, data_config: dict[str, Any], workers: int, max_corrupt: float = 0.0
) -> Batches:
    """Batches in `order`, by `recipe`."""
    transform, samples = train_transform(recipe, data_config), len(data.train)
    dataset = Augmented(data.train, transform, recipe.seed, allowed(max_corrupt, samples))
    return Batches(_loader(dataset, workers, batch_sampler=order), samples, max_corrupt)


def val_loader(
    dataset: Any, transform: transforms.Compose, batch_size: int, mine: range, workers: int, max_corrupt: float = 0.0
) -> Batches:
    """The samples numbered `mine`, in order, but for corrupt ones."""
    loader = _loader(Shown(dataset, transform), workers, batch_size=batch_size, sampler=mine)
    rounds = math.ceil(math.ceil(len(dataset) / mine.step) / batch_size)
    return Batches(loader, len(dataset), max_corrupt, rounds)


def _loader(dataset: Dataset, workers: int, **options: Any) -> Loader:
    return Loader(
        dataset,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        collate_fn=collate,
        generator=torch.Generator(),  # torch's own would be drawn from once a process
        **options,
    )
