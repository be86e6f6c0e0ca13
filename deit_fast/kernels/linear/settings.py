"""Launch settings of the GEMM family, by shape, dtype and architecture."""

from functools import lru_cache

import triton

from deit_fast.kernels.launching.hardware import MMA_SYNC, SMALL_SHARED_MEMORY, WAVES_OF_32, is_amd
from deit_fast.kernels.launching.settings import Tile, setting

# Whole rows of weight-sized tensors: `depth` is all there is.
FINISH_LINEAR = Tile(rows=4, columns=256, depth=0, num_warps=4, num_stages=1)
# Around a vendor's GEMM: every DeiT width is a multiple of 64.
RESIDUAL = Tile(rows=32, columns=64, depth=0, num_warps=4, num_stages=1)


@setting("gemm")
def gemm(columns: int, depth: int, itemsize: int, arch: str, prologue: str) -> Tile | None:
    """The tile for an [M, depth] × [depth, columns] product with `prologue` applied as the left operand loads.

    None, which only `settings` answers, is the vendor's GEMM (vendor_gemm.py).
    """
    return gemm_tile(columns, itemsize, arch, prologue)


def gemm_tile(columns: int, itemsize: int, arch: str, prologue: str) -> Tile:
    """What is shipped of `gemm`."""
    if itemsize == 4:
        if arch in MMA_SYNC:
            return Tile(64, 64 if arch == "sm_120" else 32, 32, 8, 2)
        return Tile(64, 64, 32, 8 if arch == "sm_100" else 4, 2)
    if arch in SMALL_SHARED_MEMORY:
        # GELU, residual and an index beside a longer reduction step take all registers.
        return Tile(128, 64, 64 if prologue == "layer_norm" or (prologue == "none" and not is_amd(arch)) else 32, 8, 2)
    if prologue in ("gelu", "gelu_tanh"):
        return Tile(128, 64, 64, 8, 3)
    # The epilogue of a wider tile, out of sm_100's tensor memory all at once, takes more registers than there are.
    narrow = columns % 128 or (arch == "sm_100" and prologue == "none")
    return Tile(128, 64 if narrow else 128, 64, 8, 3)


@setting("input_gradient")
def input_gradient(columns: int, itemsize: int, arch: str, activation: str) -> Tile:
    """The tile for an [M, depth] × [depth, columns] product, times the derivative of `activation`."""
    if itemsize == 4:
        return Tile(64, 32 if arch == "sm_100" else 64, 32, 8 if arch in MMA_SYNC or arch == "sm_100" else 4, 2)
    if arch in SMALL_SHARED_MEMORY:
        return Tile(128, 64, 64, 8, 2) if is_amd(arch) else Tile(128, 64, 32, 8, 3)
    # GELU's derivative beside a wider tile takes all registers, and with them the multiprocessor's second program.
    if activation != "none" and arch in MMA_SYNC:
        return Tile(128, 64, 32, 8, 4)
    return Tile(128, 128 if columns % 128 == 0 and activation == "none" else 64, 64, 8, 3)


@setting("weight_gradient")
def weight_gradient(
    out_features: int, in_features: int, itemsize: int, x_itemsize: int, arch: str, activation: str
) -> Tile:
    """The tile of an [out_features, in_features] gradient, `depth` of the tokens a step."""
    if itemsize == 4:
        return Tile(64, 64, 32, 8 if arch in MMA_SYNC else 4, 2)
    stages = 2 if arch in SMALL_SHARED_MEMORY else 3
    if activation != "none":
        # Every tile along out_features computes the activation anew, so they are as few as can be.
        rows = max(64, min(256, triton.next_power_of_2(out_features)))
        return Tile(rows, 64, 32, 8 if rows > 64 else 4, stages)
    rows, columns = (128 if n % 128 == 0 else 64 for n in (out_features, in_features))
    if rows * columns == 64 * 64:
        return Tile(rows, columns, 32, 4, 2)
    # mma.sync's operands are in registers: a float32 x, normalised, and what it is cast to side by side.
    in_registers = arch in MMA_SYNC or arch in WAVES_OF_32
    short = (rows * columns == 128 * 128 and stages == 2) or (x_itemsize > itemsize and in_registers)
    return Tile(rows, columns, 32 if short else 64, 8, stages)


@setting("finish_layer_norm_linear")
def finish_layer_norm_linear(arch: str) -> Tile:
    """Whole columns of weight-sized tensors: `depth` is all there is."""
    rows, columns = (64, 16) if arch == "sm_120" else (128, 8)
    return Tile(rows, columns, 0, 4, 1)


@lru_cache(maxsize=256)
def kept_weight_gradient(tile: Tile, itemsize: int, arch: str) -> Tile:
    """`tile` for rows that are found through an index, as drop path's kept samples are, of elements of `itemsize`."""
    if is_amd(arch):
        return tile
    # A pointer for each of the float32 rows that threads hold leaves a wider tile no registers.
    columns = min(tile.columns, 64) if itemsize == 4 and arch != "sm_90" else tile.columns
    # The index is as many steps ahead of its row as the row is of the product.
    return tile._replace(columns=columns, num_stages=2 * tile.num_stages - 1)


def splits(tiles: int, rows: int, multiprocessors: int) -> int:
    """Into how many parts the rows of a weight gradient of `tiles` tiles are split; a power of two up to 16.

    As many as fill the device once, but a part has a thousand rows: its partial sums are written and read.
    """
    most = max(1, min(16, multiprocessors // tiles, rows // 1024))
    return 1 << (most.bit_length() - 1)
