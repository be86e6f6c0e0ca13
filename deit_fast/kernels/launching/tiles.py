"""Widths and lengths as sums of powers of two, which tiles are."""

from functools import lru_cache
from typing import NamedTuple

import triton

# Row tiles that take turns over all column tiles: their rows and a column tile of weights fit in L2.
GROUP = 8
# The least that a dot takes.
_LEAST = 16


class Cover(NamedTuple):
    """`width` as two powers of two, `head` + `tail`; `tail` is 0 where one is enough.

    Every DeiT width and head width is such a sum (192 = 128 + 64, 384 = 256 + 128, 80 = 64 + 16), so no lane of
    a tile is spent on padding; other widths are masked in the tail.
    """

    head: int
    tail: int


@lru_cache(maxsize=256)
def cover(width: int) -> Cover:
    head = max(_LEAST, 1 << (width.bit_length() - 1))
    rest = width - head
    return Cover(head, max(_LEAST, triton.next_power_of_2(rest)) if rest > 0 else 0)


def tail_block(length: int, block: int) -> int:
    """The power of two that covers what is left of `length` after whole blocks; 0 where nothing is."""
    rest = length % block
    return max(_LEAST, triton.next_power_of_2(rest)) if rest else 0
