"""Backward of the patch embedding: the projection's by implicit GEMMs over the images, all others as sums of rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels import launch
from deit_fast.kernels.device import tile_of_program
from deit_fast.kernels.layout import dense, unit_stride

_GROUP = 8
_SUM_ELEMENTS = 2048
_TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _patch_offset(
    sample, patch, grid_width, image_batch, image_row, image_column, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr
):  # fmt: skip
    """Where a patch's first pixel lies in the images."""
    top = (patch // grid_width * PATCH_HEIGHT).to(tl.int64)
    left = (patch % grid_width * PATCH_WIDTH).to(tl.int64)
    return sample.to(tl.int64) * image_batch + top * image_row + left * image_column


@triton.jit
def _pixel_offset(
    k, image_channel, image_row, image_column, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr
):  # fmt: skip
    """Where number `k` of a patch flattened as (channel, row, column) lies from its first pixel."""
    channel = k // (PATCH_HEIGHT * PATCH_WIDTH)
    return (
        channel.to(tl.int64) * image_channel
        + (k // PATCH_WIDTH % PATCH_HEIGHT) * image_row
        + (k % PATCH_WIDTH) * image_column
    )


@triton.jit
def weight_gradient_kernel(
    grad_ptr,
    images_ptr,
    mask_ptr,
    mean_ptr,
    std_ptr,
    partials_ptr,
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
    DTYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [WIDTH_BLOCK, DEPTH_BLOCK] of gradᵀ @ patches, over one split of the patch rows."""
    DEPTH: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    depth_tiles: tl.constexpr = (DEPTH + DEPTH_BLOCK - 1) // DEPTH_BLOCK
    tiles: tl.constexpr = (WIDTH + WIDTH_BLOCK - 1) // WIDTH_BLOCK * depth_tiles
    # Programs of one split are neighbours: they read the same rows, from L2 after the first.
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    column = tile // depth_tiles * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)
    column_mask = column < WIDTH
    k = tile % depth_tiles * DEPTH_BLOCK + tl.arange(0, DEPTH_BLOCK)
    k_mask = k < DEPTH
    pixel = _pixel_offset(k, image_channel, image_row, image_column, PATCH_HEIGHT, PATCH_WIDTH)
    if mean_ptr is not None:
        channel = k // (PATCH_HEIGHT * PATCH_WIDTH)
        mean = tl.load(mean_ptr + channel, mask=k_mask, other=0.0).to(tl.float32)
        std = tl.load(std_ptr + channel, mask=k_mask, other=1.0).to(tl.float32)

    # Row numbers fit 32 bits: that many gradient rows would not fit any memory.
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    product = tl.zeros([WIDTH_BLOCK, DEPTH_BLOCK], dtype=tl.float32)
    for start in range(first, last, ROW_BLOCK):
        row = start + tl.arange(0, ROW_BLOCK)
        row_mask = row < last
        sample = row // patches
        patch = row % patches
        corner = _patch_offset(
            sample, patch, grid_width, image_batch, image_row, image_column, PATCH_HEIGHT, PATCH_WIDTH
        )
        pixels = tl.load(
            images_ptr + corner[:, None] + pixel[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0
        )
        if mean_ptr is not None:
            pixels = (pixels.to(tl.float32) / 255.0 - mean[None, :]) / std[None, :]
            # Rows past the end need no mask here: their gradients are zero.
        visible = row_mask
        if mask_ptr is not None:
            visible = row_mask & (tl.load(mask_ptr + row, mask=row_mask, other=1) == 0)
        grad_row = sample.to(tl.int64) * grad_batch + (patch + PREFIX).to(tl.int64) * grad_token
        grad = tl.load(
            grad_ptr + grad_row[:, None] + column[None, :], mask=visible[:, None] & column_mask[None, :], other=0.0
        )
        product = tl.dot(tl.trans(grad.to(DTYPE)), pixels.to(DTYPE), product, input_precision=PRECISION)

    partial = partials_ptr + split.to(tl.int64) * WIDTH * DEPTH
    tl.store(
        partial + column[:, None] * DEPTH + k[None, :],
        product.to(partials_ptr.dtype.element_ty),
        mask=column_mask[:, None] & k_mask[None, :],
    )


@triton.jit
def image_gradient_kernel(
    grad_ptr,
    weight_ptr,
    mask_ptr,
    grad_images_ptr,
    rows,
    patches,
    grid_width,
    grad_batch,
    grad_token,
    image_batch,
    image_channel,
    image_row,
    image_column,
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [ROW_BLOCK, DEPTH_BLOCK] of grad @ weight, stored where its pixels lie: patches do not overlap."""
    DEPTH: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    depth_tiles: tl.constexpr = (DEPTH + DEPTH_BLOCK - 1) // DEPTH_BLOCK
    tile_m, tile_n = tile_of_program(tl.cdiv(rows, ROW_BLOCK), depth_tiles, GROUP)
    row = tile_m * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    row_mask = row < rows
    sample = row // patches
    patch = row % patches
    k = tile_n * DEPTH_BLOCK + tl.arange(0, DEPTH_BLOCK)
    k_mask = k < DEPTH
    visible = row_mask
    if mask_ptr is not None:
        visible = row_mask & (tl.load(mask_ptr + row, mask=row_mask, other=1) == 0)
    grad_row = sample.to(tl.int64) * grad_batch + (patch + PREFIX).to(tl.int64) * grad_token

    product = tl.zeros([ROW_BLOCK, DEPTH_BLOCK], dtype=tl.float32)
    for start in range(0, WIDTH, WIDTH_BLOCK):
        column = start + tl.arange(0, WIDTH_BLOCK)
        column_mask = column < WIDTH
        grad = tl.load(
            grad_ptr + grad_row[:, None] + column[None, :], mask=visible[:, None] & column_mask[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptr + column[:, None] * DEPTH + k[None, :], mask=column_mask[:, None] & k_mask[None, :], other=0.0
        )
        product = tl.dot(grad.to(weight.dtype), weight, product, input_precision=PRECISION)

    corner = _patch_offset(sample, patch, grid_width, image_batch, image_row, image_column, PATCH_HEIGHT, PATCH_WIDTH)
    pixel = _pixel_offset(k, image_channel, image_row, image_column, PATCH_HEIGHT, PATCH_WIDTH)
    tl.store(
        grad_images_ptr + corner[:, None] + pixel[None, :],
        product.to(grad_images_ptr.dtype.element_ty),
        mask=row_mask[:, None] & k_mask[None, :],
    )


@triton.jit
def token_gradients_kernel(
    grad_ptr,
    mask_ptr,
    first_token_ptr,
    second_token_ptr,
    pos_embed_ptr,
    bias_partials_ptr,
    mask_token_partials_ptr,
    first,
    batch,
    patches,
    grad_batch,
    grad_token,
    WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    PREFIX_POSITIONS: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    """The sum over the batch of one row of the sequence (the first is number `first`), wherever it is wanted.

    A prefix row's is its token's gradient; a patch row's goes, by its mask, into the partials of bias or mask token.
    """
    column_tiles: tl.constexpr = (WIDTH + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    token = first + tl.program_id(0) // column_tiles
    patch = token - PREFIX
    column = tl.program_id(0) % column_tiles * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < WIDTH
    visible = tl.zeros([BATCH_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
    masked = tl.zeros([BATCH_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
    for start in range(0, batch, BATCH_BLOCK):
        sample = start + tl.arange(0, BATCH_BLOCK)
        sample_mask = sample < batch
        grad_row = sample.to(tl.int64) * grad_batch + token.to(tl.int64) * grad_token
        grad = tl.load(
            grad_ptr + grad_row[:, None] + column[None, :], mask=sample_mask[:, None] & column_mask[None, :], other=0.0
        ).to(tl.float32)
        if mask_ptr is not None:
            mask_row = mask_ptr + sample.to(tl.int64) * patches + patch
            is_masked = tl.load(mask_row, mask=sample_mask & (patch >= 0), other=0) != 0
            masked += tl.where(is_masked[:, None], grad, 0.0)
            grad = tl.where(is_masked[:, None], 0.0, grad)
        visible += grad

    of_visible = tl.sum(visible, axis=0)
    total = of_visible
    if mask_ptr is not None:
        of_masked = tl.sum(masked, axis=0)
        total += of_masked
        if mask_token_partials_ptr is not None:
            tl.store(mask_token_partials_ptr + patch * WIDTH + column, of_masked, mask=column_mask & (patch >= 0))
    if bias_partials_ptr is not None:
        tl.store(bias_partials_ptr + patch * WIDTH + column, of_visible, mask=column_mask & (patch >= 0))
    if first_token_ptr is not None:
        tl.store(first_token_ptr + column, total.to(first_token_ptr.dtype.element_ty), mask=column_mask & (token == 0))
    if second_token_ptr is not None:
        tl.store(
            second_token_ptr + column, total.to(second_token_ptr.dtype.element_ty), mask=column_mask & (token == 1)
        )
    if pos_embed_ptr is not None:
        position = patch
        if PREFIX_POSITIONS:
            position = token
        tl.store(
            pos_embed_ptr + position * WIDTH + column,
            total.to(pos_embed_ptr.dtype.element_ty),
            mask=column_mask & (position >= 0),
        )


@triton.jit
def sum_partials_kernel(
    partials_ptr, total_ptr, count, columns, COUNT_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr
):  # fmt: skip
    """Column sums of float32 [count, columns], in an order that does not depend on the run."""
    column = tl.program_id(0).to(tl.int64) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < columns
    total = tl.zeros([COUNT_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
    for start in range(0, count, COUNT_BLOCK):
        i = start + tl.arange(0, COUNT_BLOCK).to(tl.int64)
        partials = partials_ptr + i[:, None] * columns + column[None, :]
        total += tl.load(partials, mask=(i < count)[:, None] & column_mask[None, :], other=0.0)
    tl.store(total_ptr + column, tl.sum(total, axis=0).to(total_ptr.dtype.element_ty), mask=column_mask)
