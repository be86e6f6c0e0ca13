"""Launch settings of the patch embedding, by shape, dtype and architecture."""

import triton

from deit_fast.kernels.launching.hardware import is_amd
from deit_fast.kernels.launching.settings import Tile, setting
from deit_fast.kernels.linear.settings import gemm_tile


@setting("patch_embed")
def patch_embed(width: int, patch_width: int, depth: int, itemsize: int, arch: str) -> Tile:
    tile = gemm_tile(width, itemsize, arch, "none")
    # The pixels of a patch whose width is no power of two are found one by one, with an address for each.
    return tile if patch_width % 16 == 0 else tile._replace(columns=min(64, tile.columns), depth=32, num_stages=2)


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
