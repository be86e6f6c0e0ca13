"""The projection weight's gradient: an implicit GEMM over the images, split over the patches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.launching import hardware, run
from deit_fast.kernels.launching.layout import TRITON_DTYPES
from deit_fast.kernels.launching.metadata import described_product, patch_values
from deit_fast.kernels.patch_embed import settings
from deit_fast.kernels.patch_embed.patches import patch_offset, pixel_offset
from deit_fast.kernels.patch_embed.token_gradients import sum_partials


@triton.jit(
    do_not_specialize=["rows", "rows_per_split", "patches", "grid_width"],
    **described_product(
        "patch_weight_gradient_kernel",
        lambda a: (a["width"], patch_values(a), a["rows"]),
        ("std_ptr", "mask_ptr"),
    ),
)
def patch_weight_gradient_kernel(
    grad_ptr,  # [B, PREFIX + patches, width]
    images_ptr,  # [B, CHANNELS, height, width], uint8 with mean and std
    mask_ptr,  # [B, patches], uint8, or None
    mean_ptr,  # [CHANNELS] or None
    std_ptr,  # [CHANNELS] or None
    partials_ptr,  # [splits, width, CHANNELS, PATCH_HEIGHT, PATCH_WIDTH]
    rows,
    rows_per_split,
    patches,
    grid_width,
    grad_batch,
    grad_token,
    image_batch,
    image_channel,
    image_row,
    image_column,
    width,
    DTYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [WIDTH_BLOCK, DEPTH_BLOCK] of `dW = gradᵀ @ patches`, over one split of the patch rows.

    A convolution's weight gradient as an implicit GEMM (CUTLASS), split over the rows.
    """
    DEPTH: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    depth_tiles: tl.constexpr = (DEPTH + DEPTH_BLOCK - 1) // DEPTH_BLOCK
    tiles = tl.cdiv(width, WIDTH_BLOCK) * depth_tiles
    # Programs of one split are neighbours: they read the same rows, from L2 after the first.
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    column = tile // depth_tiles * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)
    column_mask = column < width
    k = tile % depth_tiles * DEPTH_BLOCK + tl.arange(0, DEPTH_BLOCK)
    k_mask = k < DEPTH
    pixel = pixel_offset(k, image_channel, image_row, image_column, PATCH_HEIGHT, PATCH_WIDTH)
    if mean_ptr is not None:
        channel = k // (PATCH_HEIGHT * PATCH_WIDTH)
        mean = tl.load(mean_ptr + channel, mask=k_mask, other=0.0).to(tl.float32)
        std = tl.load(std_ptr + channel, mask=k_mask, other=1.0).to(tl.float32)
        scale = 1.0 / (255.0 * std)
        shift = mean / std

    # Row numbers fit 32 bits: that many gradient rows would not fit any memory.
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    product = tl.zeros([WIDTH_BLOCK, DEPTH_BLOCK], dtype=tl.float32)
    for start in range(first, last, ROW_BLOCK):
        row = start + tl.arange(0, ROW_BLOCK)
        row_mask = row < last
        sample = row // patches
        patch = row % patches
        corner = patch_offset(
            sample, patch, grid_width, image_batch, image_row, image_column, PATCH_HEIGHT, PATCH_WIDTH
        )
        pixels = tl.load(
            images_ptr + corner[:, None] + pixel[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0
        )
        if mean_ptr is not None:
            # Not zero where masked, but there the gradients are.
            pixels = pixels.to(tl.float32) * scale[None, :] - shift[None, :]
        visible = row_mask
        if mask_ptr is not None:
            visible = row_mask & (tl.load(mask_ptr + row, mask=row_mask, other=1) == 0)
        grad_row = sample.to(tl.int64) * grad_batch + (patch + PREFIX).to(tl.int64) * grad_token
        # Loaded as the transposed tile: `tl.trans` of a converted float32 tile makes the copies 4 bytes wide.
        grad = tl.load(
            grad_ptr + column[:, None] + grad_row[None, :], mask=column_mask[:, None] & visible[None, :], other=0.0
        )
        product = tl.dot(grad.to(DTYPE), pixels.to(DTYPE), product, input_precision=PRECISION)

    partial = partials_ptr + split.to(tl.int64) * width * DEPTH
    tl.store(
        partial + column[:, None] * DEPTH + k[None, :],
        product.to(partials_ptr.dtype.element_ty),
        mask=column_mask[:, None] & k_mask[None, :],
    )


def patch_weight_gradient(
    grad: Tensor,
    images: Tensor,
    mask: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    prefix: int,
    of_weight: Tensor,
) -> None:
    """Fills of_weight [D, C, p, q] from grad [B, prefix + P, D] and images [B, C, H, W].

    mask: uint8 [B, P]; mean, std: [C].
    """
    batch, tokens, width = grad.shape
    patches = tokens - prefix
    channels, patch_height, patch_width = of_weight.shape[1:]
    depth = channels * patch_height * patch_width
    rows = batch * patches
    arch = hardware.architecture(grad)
    tile, rows_per_split = settings.patch_embed_weight_gradient(rows, width, depth, of_weight.element_size(), arch)
    tiles = triton.cdiv(width, tile.rows) * triton.cdiv(depth, tile.columns)
    splits = triton.cdiv(rows, rows_per_split)
    partials = of_weight
    if splits > 1:
        partials = torch.empty((splits, width, depth), dtype=torch.float32, device=grad.device)
    run.run(
        patch_weight_gradient_kernel,
        splits * tiles,
        grad.device,
        grad,
        images,
        mask,
        mean,
        std,
        partials,
        rows,
        rows_per_split,
        patches,
        images.shape[3] // patch_width,
        *grad.stride()[:2],
        *images.stride(),
        width,
        DTYPE=TRITON_DTYPES[of_weight.dtype],
        CHANNELS=channels,
        PATCH_HEIGHT=patch_height,
        PATCH_WIDTH=patch_width,
        PREFIX=prefix,
        WIDTH_BLOCK=tile.rows,
        DEPTH_BLOCK=tile.columns,
        ROW_BLOCK=tile.depth,
        PRECISION=hardware.dot_precision(of_weight.dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        sum_partials(partials, of_weight)
