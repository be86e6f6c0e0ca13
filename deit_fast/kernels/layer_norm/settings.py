"""Launch settings of LayerNorm, by shape, dtype and architecture."""

import triton

from deit_fast.kernels.launching.hardware import WAVES_OF_64
from deit_fast.kernels.launching.settings import Tile, setting
from deit_fast.kernels.launching.tiles import cover

# Sums over rows: `depth` of them a program, `rows` a step; a few hundred programs at batch 32.
COLUMN_SUMS = Tile(rows=32, columns=64, depth=256, num_warps=4, num_stages=1)


@setting("layer_norm_rows")
def layer_norm_rows(width: int, itemsizes: tuple[int, ...], arch: str) -> tuple[int, int]:
    """Rows a program and its warps: 128 bits a thread of either tile of a row, about two thousand elements on chip."""
    head, tail = cover(width)
    # float32 beside 16 bits by half as many threads spills; in narrow rows, by as many.
    warps = 8 if width > (128 if len(set(itemsizes)) > 1 else 4096) else 4
    threads = warps * (64 if arch in WAVES_OF_64 else 32)
    rows = max(1, 2048 // triton.next_power_of_2(width), threads * 16 // (min(itemsizes) * (tail or head)))
    return rows, warps
