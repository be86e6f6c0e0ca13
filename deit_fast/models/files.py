"""Files and folders that are whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

PARTIAL, OLD = ".partial", ".old"


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Where to write a new file or folder, which takes the name of `target`, and its place, once it is on the disk.

    Raises:
        OSError: it can't be written, say to a full disk; what was there before still is.
    """
    partial, old = (target.with_name(target.name + suffix) for suffix in (PARTIAL, OLD))
    try:
        _remove(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if target.is_dir():  # which no rename replaces
            _remove(old)
            target.rename(old)
        partial.replace(target)
        _sync(target.parent)
        _remove(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two of torch and safetensors for a full disk
        _remove(partial)
        raise OSError(f"{target} could not be written: {error}") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
