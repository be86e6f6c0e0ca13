"""Where patches and their pixels lie in images, which are never laid out as a matrix of patches."""

import triton
import triton.language as tl


@triton.jit
def patch_offset(
    sample, patch, grid_width, image_batch, image_row, image_column,
    PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr,
):  # fmt: skip
    """Where a patch's first pixel lies in the images."""
    top = (patch // grid_width * PATCH_HEIGHT).to(tl.int64)
    left = (patch % grid_width * PATCH_WIDTH).to(tl.int64)
    return sample.to(tl.int64) * image_batch + top * image_row + left * image_column


@triton.jit
def pixel_offset(
    k, image_channel, image_row, image_column, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr
):  # fmt: skip
    """Where number `k` of a patch flattened as (channel, row, column) lies from its first pixel."""
    channel = k // (PATCH_HEIGHT * PATCH_WIDTH)
    return (
        channel.to(tl.int64) * image_channel
        + (k // PATCH_WIDTH % PATCH_HEIGHT).to(tl.int64) * image_row
        + (k % PATCH_WIDTH).to(tl.int64) * image_column
    )
