"""A teacher's answers on disk, by epoch, step and part of the batch: what the first run writes, the next ones read."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deit_fast.models.files import whole
from deit_fast.train.checkpoints import check_same

IDENTITY = "identity.json"
# Of answers that wait to be written.
SHARD_BYTES = 2**26
# Epoch, step, and part of the batch.
Key = tuple[int, int, int]


class Logits:
    """Logits [images, classes], float32, below `folder`: a folder an epoch, of safetensors files with a tensor a key.

    A file has its name once all of it is on the disk. Each process writes the parts that it computed.

    identity: what the logits follow from.
    hard: the index of the likeliest class is kept alone; what is read is 1 there, and 0 elsewhere.

    Raises:
        ValueError: the folder holds the logits of another identity.
        OSError: it can't be written.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], classes: int, hard: bool):
        self.folder, self.classes, self.hard = folder, classes, hard
        self._epoch, self._there = -1, dict[str, Any]()
        self._new, self._bytes = dict[str, Tensor](), 0
        if not (folder / IDENTITY).exists():
            with whole(folder / IDENTITY) as path:
                path.write_text(json.dumps(identity, indent=1))
        check_same(folder, json.loads((folder / IDENTITY).read_text()), json.loads(json.dumps(identity)))

    def get(self, key: Key, device: torch.device) -> Tensor | None:
        """What was put there, or None.

        Raises:
            OSError: a file that can't be read.
        """
        epoch, step, part = key
        if epoch != self._epoch:
            self._open(epoch)
        file = self._there.get(f"{step}.{part}")
        if file is None:
            return None
        kept = file.get_tensor(f"{step}.{part}").to(device)
        return F.one_hot(kept.long(), self.classes).float() if self.hard else kept

    def put(self, key: Key, logits: Tensor) -> None:
        """To be written with others, at the latest by `flush`. key: of the epoch of the last `get`."""
        _, step, part = key
        kept = logits.argmax(-1).int() if self.hard else logits
        self._new[f"{step}.{part}"] = kept
        self._bytes += kept.nbytes
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was put; a disk that takes no more is a warning."""
        if not self._new:
            return
        path = self._of(self._epoch) / f"{next(iter(self._new))}.safetensors"
        try:
            with whole(path) as partial:
                save_file({name: kept.cpu() for name, kept in self._new.items()}, partial)
        except OSError as error:
            warnings.warn(f"{error}; training goes on", stacklevel=2)
        self._new, self._bytes = {}, 0

    def _of(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}"

    def _open(self, epoch: int) -> None:
        self.flush()
        self._epoch, self._there = epoch, {}
        for path in self._of(epoch).glob("*.safetensors"):
            try:
                file: Any = safe_open(path, "pt")
            except SafetensorError as error:
                raise OSError(f"{path} can't be read: {error}") from error
            self._there.update(dict.fromkeys(file.keys(), file))
