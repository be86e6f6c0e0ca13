"""Launch settings of the GEMM family, by shape, dtype and architecture."""

from collections.abc import Sequence
from functools import lru_cache

import triton

from deit_fast.kernels.launching.hardware import MMA_SYNC, SMALL_SHARED_MEMORY, interpreted, is_amd
from deit_fast.kernels.launching.settings import Tile, setting

# Whole rows of weight-sized tensors: `depth` is all there is.
FINISH_LINEAR = Tile(rows=4, columns=256, depth=0, num_warps=4, num_stages=1)
# Around a vendor's GEMM: every DeiT width is a multiple of 64.
EPILOGUE = Tile(rows=32, columns=64, depth=0, num_warps=4, num_stages=1)
# What is done to every element of a gradient or a weight, once.
ELEMENTWISE = Tile(rows=32, columns=64, depth=0, num_warps=4, num_stages=1)
# GELU and its derivative beside an accumulator, as many columns of it at a time as registers allow.
EPILOGUE_COLUMNS = 32
# There are enough tiles of these and more, however large.
_MOST_ROWS = 16384


def rows_asked(rows: int) -> int:
    """`rows` as tables are asked for them, a power of two: what is measured holds for a few batches, not for one."""
    if interpreted():
        # As for the architecture: it is quickest with the largest tiles.
        return _MOST_ROWS
    return max(128, min(_MOST_ROWS, triton.next_power_of_2(rows)))


def fused(activation: str, with_activated: bool, with_residual: bool) -> str:
    """What follows a product, as `gemm` is asked: the activation, "activated" beside what goes into it, "residual"."""
    return "residual" if with_residual else "activated" if with_activated else activation


@setting("vendor")
def vendor(
    product: str,
    fused: str,
    rows: int,
    columns: int,
    depth: int,
    itemsize: int,
    arch: str,
    projections: int,
    kept: bool,
) -> bool:
    """Whether the vendor's GEMM (vendor_gemm.py) makes the [rows, depth] × [depth, columns] product, or three of them.

    product: "linear", "input_gradient" or "weight_gradient"; fused: what follows it. The tokens, which are `rows` or a
    weight gradient's `depth`, are given as `rows_asked`. kept: only of samples that drop path keeps, where the vendor's
    GEMM computes the others too.

    By an estimate, at many tokens of 16 bits: where NVIDIA's heuristic for its own GEMMs, nvMatmulHeuristics, says a
    tenth less time than ours is modelled with. `deit-fast tune` measures both.
    """
    of_weight = product == "weight_gradient"
    if itemsize != 2 or kept or (depth if of_weight else rows) < _MOST_ROWS or (projections > 1 and not of_weight):
        return False
    if arch == "sm_89":
        if of_weight:
            return min(rows, columns) >= (384 if rows >= columns else 192)
        if product == "input_gradient":
            return columns >= (192 if depth > columns else 384) and depth >= columns
        return (columns >= 384 and depth > columns) or (fused == "none" and depth >= 768)
    if of_weight:
        # On sm_80 of FC2 and the attention's projection.
        return min(rows, columns) >= 768 and (arch == "sm_90" or (arch == "sm_80" and rows <= columns))
    # FC2, and the input's gradient of FC1 and QKV: the longest sums.
    return arch in ("sm_90", "sm_80") and columns >= 768 and depth > columns


@setting("gemm")
def gemm(rows: int, columns: int, depth: int, itemsize: int, arch: str, fused: str) -> Tile:
    """The tile for a [rows, depth] × [depth, columns] product; rows: `rows_asked`, fused: what follows it."""
    narrow = Tile(128, 64, 32, 4, 4)
    if itemsize == 4 and arch in MMA_SYNC:
        tiles = [Tile(64, 64 if arch == "sm_120" else 32, 32, 8, 2)]
    elif itemsize == 4:
        tiles = [Tile(64, 64, 32, 8 if arch == "sm_100" else 4, 2)]
    elif is_amd(arch):
        # A residual and an index beside a longer reduction step take all registers.
        tiles = [Tile(128, 64, 32 if fused == "residual" else 64, 8, 2)]
    elif arch == "sm_100":
        tiles = [Tile(128, 64 if columns % 128 else 128, 64, 8, 3)]
    elif arch == "sm_90":
        whole = Tile(128, 256, 64, 8, 3) if columns % 256 == 0 else Tile(256, 128, 64, 8, 3)
        tiles = [whole, Tile(128, 128, 64, 8, 3)]
    elif arch == "sm_80" and (columns % 128 == 0 or columns > 256):
        tiles = [Tile(128, 128, 32, 4, 4), narrow]
    else:
        tiles = [narrow]
    return _first_that_fills(rows, columns, *tiles, *_few_rows(itemsize, arch))


@setting("persistent")
def persistent(rows: int, columns: int, depth: int, itemsize: int, arch: str, fused: str) -> bool:
    """Whether persistent programs (persistent.py) make a product that they take; asked as `gemm`.

    Nobody has measured that they are faster. `deit-fast tune` does.
    """
    return False


@setting("persistent_gemm")
def persistent_gemm(rows: int, columns: int, depth: int, itemsize: int, arch: str, fused: str) -> Tile:
    """Their tile, asked as `gemm`: as large as has room, since a multiprocessor has one such program."""
    if arch == "sm_120":
        whole = Tile(128, 128, 64, 8, 3)
    else:
        whole = Tile(128, 256, 64, 8, 3) if columns % 256 == 0 else Tile(256, 128, 64, 8, 3)
    return _first_that_fills(rows, columns, whole, Tile(128, 128, 64, 8, 3), *_FEW_ROWS)


_FEW_ROWS = (Tile(64, 64, 64, 4, 3), Tile(32, 64, 64, 4, 4), Tile(32, 32, 64, 4, 4))


def _few_rows(itemsize: int, arch: str) -> Sequence[Tile]:
    """The tiles where larger ones are too few, each smaller than the one before."""
    if itemsize == 4:
        return [Tile(64, 32, 32, 8, 2) if arch == "sm_100" else Tile(32, 32, 32, 8 if arch == "sm_120" else 4, 2)]
    if is_amd(arch):
        return [tile._replace(num_stages=2) for tile in _FEW_ROWS]
    # sm_100's registers do not hold 64 × 64 beside a GELU.
    return _FEW_ROWS[1:] if arch == "sm_100" else _FEW_ROWS


# Of the GPUs that have such settings; 128 or so of those that training is done on.
_MULTIPROCESSORS = 128


def _first_that_fills(rows: int, columns: int, *tiles: Tile) -> Tile:
    """The first of `tiles`, each smaller than the one before, that there are enough of for all multiprocessors."""
    for tile in tiles:
        if triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) >= _MULTIPROCESSORS:
            return tile
    return tiles[-1]


def quarters(tile: Tile, fused: str, arch: str) -> bool:
    """Whether the epilogue runs over a quarter of the tile's columns at a time: of 64 a thread, or more.

    All at once they leave no registers for what an epilogue reads or writes besides; on sm_100, whose products lie in
    memory of their own, they take none before it does.
    """
    if is_amd(arch) or tile.rows * tile.columns < 64 * 32 * tile.num_warps:
        return False
    return arch == "sm_100" or fused in ("residual", "activated")


@setting("input_gradient")
def input_gradient(rows: int, columns: int, itemsize: int, arch: str, activation: str, projections: int) -> Tile:
    """The tile for a [rows, depth] × [depth, columns] product, times the derivative of `activation`.

    Or for the sum of three such products, of three `projections`. rows: `rows_asked`.
    """
    # sm_120's compiler keeps twice as many threads a program to 128 registers.
    narrow = Tile(128, 64, 32, 8, 3) if arch == "sm_120" else Tile(128, 64, 32, 4, 4)
    if itemsize == 4:
        tiles = [Tile(64, 32 if arch == "sm_100" else 64, 32, 8 if arch in MMA_SYNC or arch == "sm_100" else 4, 2)]
    elif is_amd(arch):
        tiles = [Tile(128, 64, 64, 8, 2)]
    elif arch == "sm_100" and activation != "none":
        tiles = [Tile(128, 64, 64, 4, 3)]
    elif arch == "sm_100":
        tiles = [Tile(128, 128 if columns % 128 == 0 else 64, 64, 8, 3)]
    elif arch == "sm_90":
        whole = Tile(128, 64, 64, 8, 3) if columns <= 64 else _least_padding(_WIDE, 1, columns)
        tiles = [whole, Tile(128, 128, 64, 8, 3)]
    # The addresses of three products at once leave a wide tile too few registers.
    elif columns % 128 == 0 and projections == 1 and (arch == "sm_80" or activation != "none"):
        tiles = [Tile(128, 128, 32, 4, 4 if arch == "sm_80" else 3), narrow]
    else:
        tiles = [narrow]
    return _first_that_fills(rows, columns, *tiles, *_few_rows(itemsize, arch))


@setting("weight_gradient")
def weight_gradient(out_features: int, in_features: int, itemsize: int, arch: str) -> Tile:
    """The tile of an [out_features, in_features] gradient, `depth` of the tokens a step."""
    if itemsize == 4:
        return Tile(64, 64, 32, 8 if arch in MMA_SYNC else 4, 2)
    if max(out_features, in_features) <= 64:
        return Tile(64, 64, 32, 4, 2)
    shape = out_features, in_features
    if arch == "sm_90":
        return _least_padding((*_WIDE, Tile(128, 128, 64, 8, 3)), 1.25, *shape)
    if arch == "sm_80":
        return _least_padding((Tile(128, 128, 32, 4, 4), Tile(64, 64, 64, 4, 3)), 1.5, *shape)
    if arch in MMA_SYNC:
        return _least_padding((Tile(128, 128, 32, 4, 3), Tile(64, 64, 64, 4, 2)), 1.25, *shape)
    stages = 2 if arch in SMALL_SHARED_MEMORY else 3
    rows, columns = (128 if n % 128 == 0 else 64 for n in shape)
    if rows * columns == 64 * 64:
        return Tile(rows, columns, 32, 4, 2)
    return Tile(rows, columns, 32 if rows * columns == 128 * 128 and stages == 2 else 64, 8, stages)


# wgmma's largest tiles: what they load, of L2 and of shared memory, is the least for a multiplication.
_WIDE = (Tile(128, 256, 64, 8, 3), Tile(256, 128, 64, 8, 3))


def _least_padding(candidates: Sequence[Tile], cost_of_last: float, *shape: int) -> Tile:
    """Of tiles of an output of this shape, or so many columns, the one that pads it least; of equals the first.

    An element of the last one's, a smaller tile, costs `cost_of_last` of the others': it loads its operands more often.
    """

    def cost(tile: Tile) -> float:
        padded = 1
        for length, block in zip(reversed(shape), (tile.columns, tile.rows), strict=False):
            padded *= triton.cdiv(length, block) * block
        return padded * (cost_of_last if tile is candidates[-1] else 1)

    return min(candidates, key=cost)


@setting("finish_layer_norm_linear")
def finish_layer_norm_linear(arch: str) -> Tile:
    """Whole columns of weight-sized tensors: `depth` is all there is."""
    rows, columns = (64, 16) if arch == "sm_120" else (128, 8)
    return Tile(rows, columns, 0, 4, 1)


@lru_cache(maxsize=1024)
def splits(programs: int, rows: int, slots: int, most: int) -> int:
    """Into how many parts the rows of a weight gradient are split, of `programs` programs each.

    As few as fill the device's `slots` in whole waves best, of 512 rows at least, and no more than `most`. A program's
    partial sums, which are written and read again, cost it as much as a thousand rows.
    """

    def cost(parts: int) -> float:
        return triton.cdiv(programs * parts, slots) * (rows / parts + 1024)

    choices = range(1, max(1, min(most, rows // 512)) + 1)
    least = min(map(cost, choices))
    return next(parts for parts in choices if cost(parts) <= 1.03 * least)
