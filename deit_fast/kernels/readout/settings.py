"""Launch settings of readout attention, by shape, dtype and architecture."""

from typing import NamedTuple

import triton

from deit_fast.kernels.launching.hardware import SMALL_SHARED_MEMORY, is_amd
from deit_fast.kernels.launching.settings import setting


class ReadoutTile(NamedTuple):
    """`queries` over `tokens` a step, rows of x as tiles `chunk` wide."""

    queries: int
    tokens: int
    chunk: int
    num_warps: int
    num_stages: int


def _readout_chunk(width: int) -> int:
    """128, or 64 where that pads a row less, or is half of it; the power of two that covers narrower rows."""
    chunk = min((128, 64), key=lambda chunk: triton.cdiv(width, chunk) * chunk) if width > 128 else 64
    return min(chunk, max(16, triton.next_power_of_2(width)))


@setting("readout")
def readout(width: int, itemsize: int, arch: str) -> ReadoutTile:
    warps = 4 if (width <= 192 and itemsize == 2) or (is_amd(arch) and width > 384) else 8
    return ReadoutTile(16, 32 if width <= 384 else 16, _readout_chunk(width), warps, 1)


@setting("readout_backward")
def readout_backward(width: int, queries: int, itemsize: int, arch: str) -> ReadoutTile:
    """The tokens are a program's.

    Few tiles of queries: the compiler's time grows with the square of the unrolled accesses, and more.
    """
    widest = 768 if is_amd(arch) else 1024
    if itemsize == 4:
        widest = 0 if arch in SMALL_SHARED_MEMORY or arch == "sm_100" else 192
    # Wide rows in narrow tiles: less of the next tile is under way at once.
    chunk = min(64, _readout_chunk(width)) if width > 512 else _readout_chunk(width)
    return ReadoutTile(32 if queries > 16 else 16, 32 if width <= widest else 16, chunk, 8, 1)
