"""Launch settings of the patch embedding, by shape, dtype and architecture."""

import triton

from deit_fast.kernels.launching.hardware import MMA_SYNC, SMALL_SHARED_MEMORY, is_amd
from deit_fast.kernels.launching.settings import Tile, setting


@setting("patch_embed")
def patch_embed(width: int, patch_width: int, depth: int, itemsize: int, arch: str) -> Tile:
    tile = _tile(width, itemsize, arch)
    # The pixels of a patch whose width is no power of two are found one by one, with an address for each.
    return tile if patch_width % 16 == 0 else tile._replace(columns=min(64, tile.columns), depth=32, num_stages=2)


def _tile(width: int, itemsize: int, arch: str) -> Tile:
    if itemsize == 4:
        if arch in MMA_SYNC:
            return Tile(64, 64 if arch == "sm_120" else 32, 32, 8, 2)
        return Tile(64, 64, 32, 8 if arch == "sm_100" else 4, 2)
    if arch in SMALL_SHARED_MEMORY:
        return Tile(128, 64, 32 if is_amd(arch) else 64, 8, 2)
    # The epilogue of a wider tile, out of sm_100's tensor memory all at once, takes more registers than there are.
    return Tile(128, 64 if width % 128 or arch == "sm_100" else 128, 64, 8, 3)


@setting("patch_embed_weight_gradient")
def patch_embed_weight_gradient(rows: int, width: int, depth: int, itemsize: int, arch: str) -> tuple[Tile, int]:
    """The tile of gradᵀ [width, rows] × patches [rows, depth], and how many rows a program sums.

    The rows are split among some 256 programs, about two a multiprocessor, of 256 rows at least.
    """
    if itemsize == 4:
        tile = Tile(64, 64, 32, 8, 2)
    else:
        tile = Tile(128 if width % 128 == 0 else 64, 128, 32, 8, 2 if is_amd(arch) else 3)
    tiles = triton.cdiv(width, tile.rows) * triton.cdiv(depth, tile.columns)
    splits = max(1, min(256 // tiles, rows // 256))
    return tile, triton.cdiv(triton.cdiv(rows, splits), tile.depth) * tile.depth


@setting("image_gradient")
def image_gradient(depth: int, itemsize: int, arch: str) -> Tile:
    """The tile of grad [rows, width] × weight [width, depth]."""
    if itemsize == 4:
        return Tile(64, 32 if arch == "sm_100" else 64, 32, 8 if arch in MMA_SYNC or arch == "sm_100" else 4, 2)
    if arch in SMALL_SHARED_MEMORY:
        return Tile(128, 64, 64, 8, 2) if is_amd(arch) else Tile(128, 64, 32, 8, 3)
    return Tile(128, 128 if depth % 128 == 0 else 64, 64, 8, 3)
