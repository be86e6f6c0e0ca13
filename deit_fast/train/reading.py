"""Samples read and decoded, and what becomes of corrupt ones: each is counted and named."""

import time
from collections.abc import Iterator
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from deit_fast.data.images import decode, to_rgb
from deit_fast.train.pixels import ByteImages, batched

# Image or `ByteImages`, and class; of a corrupt sample None twice. Names of corrupt samples, and what is wrong with
# each: an OSError where it is the file system.
Item = tuple[Any, Any, dict[str, Any]]
SHOWN = 3
# Seconds before each new try where the file system fails.
PAUSES = (0.5, 2.0, 8.0)


def read(dataset: Any, index: int) -> Item:
    """A sample of a dataset of timm's `create_dataset`, its image as `deit_fast.data.load_image` has it.

    The dataset's own decoding is left out: timm's puts another sample in a corrupt one's place, and says so nowhere.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            return _sample(dataset, index)
        # The last two where a data set of Hugging Face has no image.
        except (OSError, ValueError, TypeError, AssertionError) as error:
            fault = _fault(error)
            pause = next(pauses, None)
            if fault is None or pause is None:
                return None, None, {_name(getattr(dataset, "reader", None), index): fault or str(error)}
        time.sleep(pause)


def _sample(dataset: Any, index: int) -> Item:
    reader = getattr(dataset, "reader", None)
    if reader is None:  # torchvision's
        image, target = dataset[index]
        return to_rgb(image), target, {}
    file, target = reader[index]
    with file:
        return decode("the file", file), target, {}


def _fault(error: Exception) -> OSError | None:
    """The file system's, say of a network, where it is to blame; Pillow's own errors have no number."""
    cause = error.__cause__ or error
    if isinstance(cause, (TimeoutError, ConnectionError)):  # of a network, which may have no number either
        return cause
    of_file = FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError
    return cause if isinstance(cause, OSError) and cause.errno and not isinstance(cause, of_file) else None


def _name(reader: Any, index: int) -> str:
    """The file's, where there is one; Hugging Face's names are not of one folder, and may be missing."""
    if reader is None or hasattr(reader, "dataset"):
        return f"sample {index}"
    return reader.filename(index) or f"sample {index}"


def collate(items: list[Item]) -> tuple[Any, Any, dict[str, str]]:
    """A batch of what could be read: `ByteImages`, classes, and the corrupt ones' names."""
    corrupt = {name: why for _, _, found in items for name, why in found.items()}
    sound = [(image, target) for image, target, _ in items if image is not None]
    if not sound:
        return None, None, corrupt
    return batched([image for image, _ in sound]), default_collate([target for _, target in sound]), corrupt


class Batches:
    """The images and classes of a loader's batches, and which of its data set's `samples` were found corrupt.

    rounds: the most batches that any process has of them.

    Raises:
        OSError: where it is looked through, more than a share `max_corrupt` of the samples are corrupt, or all; or the
            file system fails again and again.
    """

    def __init__(self, loader: DataLoader, samples: int, max_corrupt: float, rounds: int = 0):
        self.loader, self.samples, self.allowed = loader, samples, allowed(max_corrupt, samples)
        self.rounds = rounds
        # Of all processes, and what this one has found since the last `gather`.
        self.corrupt: dict[str, str] = {}
        self.new: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[ByteImages, Tensor]]:
        for images, targets, corrupt in self.loader:
            for name, why in corrupt.items():
                if isinstance(why, OSError):
                    raise OSError(f"{name} could not be read in {len(PAUSES) + 1} tries: {why}") from why
            self.new |= {name: why for name, why in corrupt.items() if name not in self.corrupt}
            self.check()
            if images is not None:
                yield images, targets

    def gather(self) -> dict[str, str]:
        """What any process has found since the last call, which all processes make."""
        found = dict(gather_object(list(self.new.items())))
        new = {name: why for name, why in found.items() if name not in self.corrupt}
        self.corrupt, self.new = self.corrupt | new, {}
        return new

    def check(self) -> None:
        """Refuse to go on where too many are corrupt."""
        corrupt = self.corrupt | self.new
        if len(corrupt) > self.allowed:
            raise OSError(f"{len(corrupt)} of {self.samples} images can't be read, {named(corrupt)}")


def named(corrupt: dict[str, str]) -> str:
    """The first of them, for a message."""
    first = [f"{name} ({why})" for name, why in list(corrupt.items())[:SHOWN]]
    return ", ".join(first) + (", …" if len(corrupt) > SHOWN else "")


def allowed(max_corrupt: float, samples: int) -> int:
    """How many of the samples may be corrupt: a share, and never all."""
    return min(int(max_corrupt * samples), samples - 1)
