"""The images' gradient: a GEMM whose tiles are stored where their pixels lie."""

import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import tile_of_program
from deit_fast.kernels.launching import hardware, run, tiles
from deit_fast.kernels.launching.metadata import described_product, patch_values
from deit_fast.kernels.patch_embed import settings
from deit_fast.kernels.patch_embed.patches import patch_offset, pixel_offset


@triton.jit(
    do_not_specialize=["rows", "patches", "grid_width"],
    **described_product("image_gradient_kernel", lambda a: (a["rows"], patch_values(a), a["width"]), ("mask_ptr",)),
)
def image_gradient_kernel(
    grad_ptr,  # [B, PREFIX + patches, width]
    weight_ptr,  # [width, CHANNELS, PATCH_HEIGHT, PATCH_WIDTH]
    mask_ptr,  # [B, patches], uint8, or None
    grad_images_ptr,  # [B, CHANNELS, height, width]
    rows,
    patches,
    grid_width,
    grad_batch,
    grad_token,
    image_batch,
    image_channel,
    image_row,
    image_column,
    width,
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [ROW_BLOCK, DEPTH_BLOCK] of `grad @ weight`, stored where its pixels lie: patches do not overlap."""
    DEPTH: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    depth_tiles: tl.constexpr = (DEPTH + DEPTH_BLOCK - 1) // DEPTH_BLOCK
    tile_m, tile_n = tile_of_program(tl.cdiv(rows, ROW_BLOCK), depth_tiles, GROUP)
    row = tile_m * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    row_mask = row < rows
    sample = row // patches
    patch = row % patches
    k = tile_n * DEPTH_BLOCK + tl.arange(0, DEPTH_BLOCK)
    k_mask = k < DEPTH
    grad_row = sample.to(tl.int64) * grad_batch + (patch + PREFIX).to(tl.int64) * grad_token

    product = tl.zeros([ROW_BLOCK, DEPTH_BLOCK], dtype=tl.float32)
    for start in range(0, width, WIDTH_BLOCK):
        column = start + tl.arange(0, WIDTH_BLOCK)
        column_mask = column < width
        grad = tl.load(
            grad_ptr + grad_row[:, None] + column[None, :], mask=row_mask[:, None] & column_mask[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptr + column[:, None] * DEPTH + k[None, :], mask=column_mask[:, None] & k_mask[None, :], other=0.0
        )
        product = tl.dot(grad.to(weight.dtype), weight, product, input_precision=PRECISION)

    if mask_ptr is not None:
        visible = tl.load(mask_ptr + row, mask=row_mask, other=1) == 0
        product = tl.where(visible[:, None], product, 0.0)
    corner = patch_offset(sample, patch, grid_width, image_batch, image_row, image_column, PATCH_HEIGHT, PATCH_WIDTH)
    pixel = pixel_offset(k, image_channel, image_row, image_column, PATCH_HEIGHT, PATCH_WIDTH)
    tl.store(
        grad_images_ptr + corner[:, None] + pixel[None, :],
        product.to(grad_images_ptr.dtype.element_ty),
        mask=row_mask[:, None] & k_mask[None, :],
    )


def image_gradient(grad: Tensor, weight: Tensor, mask: Tensor | None, prefix: int, of_images: Tensor) -> None:
    """Fills of_images [B, C, H, W] from grad [B, prefix + P, D] and weight [D, C, p, q]; mask: uint8 [B, P]."""
    batch, tokens, width = grad.shape
    patches = tokens - prefix
    channels, patch_height, patch_width = weight.shape[1:]
    depth = channels * patch_height * patch_width
    arch = hardware.architecture(grad)
    tile = settings.image_gradient(depth, weight.element_size(), arch)
    run.run(
        image_gradient_kernel,
        triton.cdiv(batch * patches, tile.rows) * triton.cdiv(depth, tile.columns),
        grad.device,
        grad,
        weight,
        mask,
        of_images,
        batch * patches,
        patches,
        of_images.shape[3] // patch_width,
        *grad.stride()[:2],
        *of_images.stride(),
        width,
        CHANNELS=channels,
        PATCH_HEIGHT=patch_height,
        PATCH_WIDTH=patch_width,
        PREFIX=prefix,
        ROW_BLOCK=tile.rows,
        DEPTH_BLOCK=tile.columns,
        WIDTH_BLOCK=tile.depth,
        GROUP=tiles.GROUP,
        PRECISION=hardware.dot_precision(weight.dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
