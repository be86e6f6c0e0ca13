"""Files that survive whatever interrupts the writing."""

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """On the disk before it returns, whole or not at all: what the file held before is there until then."""
    part = file.with_suffix(".part")
    with part.open("w") as target:
        target.write(text)
        target.flush()
        os.fsync(target.fileno())
    os.replace(part, file)
