"""Backward of the patch embedding: the projection's by implicit GEMMs over the images, all others as sums of rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels import launch
from deit_fast.kernels.device import tile_of_program
from deit_fast.kernels.layout import dense, unit_stride
from deit_fast.kernels.metadata import described, described_product, patch_values

_GROUP = 8
# Terms added at once where a kernel only sums, and columns: two thousand elements a program, 128 bytes of a row.
_LANES, _SUM_COLUMNS = 32, 64
_TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _patch_offset(
    sample, patch, grid_width, image_batch, image_row, image_column,
    PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr,
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
        + (k // PATCH_WIDTH % PATCH_HEIGHT).to(tl.int64) * image_row
        + (k % PATCH_WIDTH).to(tl.int64) * image_column
    )


@triton.jit(
    do_not_specialize=["rows", "rows_per_split", "patches", "grid_width"],
    **described_product(
        "patch_weight_gradient_kernel",
        lambda a: (a["width"], patch_values(a), a["rows"]),
        ("std_ptr", "mask_ptr"),
    ),
)
def patch_weight_gradient_kernel(
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
    """One tile [WIDTH_BLOCK, DEPTH_BLOCK] of gradᵀ @ patches, over one split of the patch rows."""
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
    pixel = _pixel_offset(k, image_channel, image_row, image_column, PATCH_HEIGHT, PATCH_WIDTH)
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
        corner = _patch_offset(
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


@triton.jit(
    do_not_specialize=["rows", "patches", "grid_width"],
    **described_product("image_gradient_kernel", lambda a: (a["rows"], patch_values(a), a["width"]), ("mask_ptr",)),
)
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
    corner = _patch_offset(sample, patch, grid_width, image_batch, image_row, image_column, PATCH_HEIGHT, PATCH_WIDTH)
    pixel = _pixel_offset(k, image_channel, image_row, image_column, PATCH_HEIGHT, PATCH_WIDTH)
    tl.store(
        grad_images_ptr + corner[:, None] + pixel[None, :],
        product.to(grad_images_ptr.dtype.element_ty),
        mask=row_mask[:, None] & k_mask[None, :],
    )


@triton.jit(
    do_not_specialize=["first", "batch", "patches"],
    **described(
        "token_gradients_kernel",
        lambda a: a["grad_ptr"].shape,
        (
            "first_token_ptr",
            "second_token_ptr",
            "pos_embed_ptr",
            "bias_partials_ptr",
            "mask_token_partials_ptr",
            "mask_ptr",
        ),
    ),
)
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
    width,
    PREFIX: tl.constexpr,
    PREFIX_POSITIONS: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    """The sum over the batch of one row of the sequence (the first is number `first`), wherever it is wanted.

    A prefix row's is its token's gradient; a patch row's goes, by its mask, into the partials of bias or mask token.
    """
    column_tiles = tl.cdiv(width, COLUMN_BLOCK)
    token = (first + tl.program_id(0) // column_tiles).to(tl.int64)
    patch = token - PREFIX
    column = tl.program_id(0) % column_tiles * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < width
    visible = tl.zeros([COLUMN_BLOCK, BATCH_BLOCK], dtype=tl.float32)
    masked = tl.zeros([COLUMN_BLOCK, BATCH_BLOCK], dtype=tl.float32)
    for start in range(0, batch, BATCH_BLOCK):
        sample = start + tl.arange(0, BATCH_BLOCK)
        sample_mask = sample < batch
        grad_row = sample.to(tl.int64) * grad_batch + token * grad_token
        grad = tl.load(
            grad_ptr + column[:, None] + grad_row[None, :], mask=column_mask[:, None] & sample_mask[None, :], other=0.0
        ).to(tl.float32)
        if mask_ptr is not None:
            mask_row = mask_ptr + sample.to(tl.int64) * patches + patch
            is_masked = tl.load(mask_row, mask=sample < tl.where(patch >= 0, batch, 0), other=0) != 0
            masked += tl.where(is_masked[None, :], grad, 0.0)
            grad = tl.where(is_masked[None, :], 0.0, grad)
        visible += grad

    of_visible = tl.sum(visible, axis=1)
    total = of_visible
    if mask_ptr is not None:
        of_masked = tl.sum(masked, axis=1)
        total += of_masked
        if mask_token_partials_ptr is not None and patch >= 0:
            tl.store(mask_token_partials_ptr + patch * width + column, of_masked, mask=column_mask)
    if bias_partials_ptr is not None and patch >= 0:
        tl.store(bias_partials_ptr + patch * width + column, of_visible, mask=column_mask)
    if first_token_ptr is not None and token == 0:
        tl.store(first_token_ptr + column, total.to(first_token_ptr.dtype.element_ty), mask=column_mask)
    if second_token_ptr is not None and token == 1:
        tl.store(second_token_ptr + column, total.to(second_token_ptr.dtype.element_ty), mask=column_mask)
    if pos_embed_ptr is not None:
        position = patch
        if PREFIX_POSITIONS:
            position = token
        if position >= 0:
            tl.store(
                pos_embed_ptr + position * width + column, total.to(pos_embed_ptr.dtype.element_ty), mask=column_mask
            )


@triton.jit(**described("sum_partials_kernel", lambda a: (a["count"], a["columns"])))
def sum_partials_kernel(
    partials_ptr, total_ptr, count, columns, COUNT_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr
):  # fmt: skip
    """Column sums of float32 [count, columns], in an order that does not depend on the run."""
    column = tl.program_id(0).to(tl.int64) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < columns
    total = tl.zeros([COLUMN_BLOCK, COUNT_BLOCK], dtype=tl.float32)
    for start in range(0, count, COUNT_BLOCK):
        i = start + tl.arange(0, COUNT_BLOCK).to(tl.int64)
        partials = partials_ptr + i[None, :] * columns + column[:, None]
        total += tl.load(partials, mask=column_mask[:, None] & (i < count)[None, :], other=0.0)
    tl.store(total_ptr + column, tl.sum(total, axis=1).to(total_ptr.dtype.element_ty), mask=column_mask)


def patch_embed_backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    dist_token: Tensor | None,
    mask_token: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Those gradients of `images`, …, `mask_token` that `needs` asks for, each like its argument.

    grad: [B, R + P, D], of the tokens. Dots run in weight's dtype, every sum in float32. Of bias, positions and
    tokens only shape and dtype matter. Masked patches have no gradient but the mask token's.
    """
    inputs = (images, weight, bias, pos_embed, cls_token, dist_token, mask_token)
    outputs = [
        torch.empty_like(x, memory_format=torch.preserve_format if x is images else torch.contiguous_format)
        if need
        else None
        for x, need in zip(inputs, needs, strict=True)
    ]
    if grad.numel() == 0:
        return [output.zero_() for output in outputs if output is not None]
    of_images, of_weight, of_bias, of_pos_embed, of_cls_token, of_dist_token, of_mask_token = outputs
    grad = unit_stride(grad)
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    prefix = (cls_token is not None) + (dist_token is not None)
    if of_weight is not None:
        _weight_gradient(grad, images, mask, dense(mean), dense(std), prefix, of_weight)
    if of_images is not None:
        _image_gradient(grad, weight.contiguous(), mask, prefix, of_images)
    if any(needs[2:]):
        prefix_tokens = [of for of, x in ((of_cls_token, cls_token), (of_dist_token, dist_token)) if x is not None]
        _token_gradients(grad, mask, prefix_tokens, of_pos_embed, of_bias, of_mask_token)
    return [of for of in outputs if of is not None]


def _weight_gradient(
    grad: Tensor,
    images: Tensor,
    mask: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    prefix: int,
    of_weight: Tensor,
) -> None:
    batch, tokens, width = grad.shape
    patches = tokens - prefix
    channels, patch_height, patch_width = of_weight.shape[1:]
    depth = channels * patch_height * patch_width
    rows = batch * patches
    arch = launch.architecture(grad)
    tile, rows_per_split = launch.patch_embed_weight_gradient(rows, width, depth, of_weight.element_size(), arch)
    tiles = triton.cdiv(width, tile.rows) * triton.cdiv(depth, tile.columns)
    splits = triton.cdiv(rows, rows_per_split)
    partials = of_weight
    if splits > 1:
        partials = torch.empty((splits, width, depth), dtype=torch.float32, device=grad.device)
    launch.run(
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
        DTYPE=_TRITON_DTYPE[of_weight.dtype],
        CHANNELS=channels,
        PATCH_HEIGHT=patch_height,
        PATCH_WIDTH=patch_width,
        PREFIX=prefix,
        WIDTH_BLOCK=tile.rows,
        DEPTH_BLOCK=tile.columns,
        ROW_BLOCK=tile.depth,
        PRECISION=launch.dot_precision(of_weight.dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        _sum_partials(partials, of_weight)


def _image_gradient(grad: Tensor, weight: Tensor, mask: Tensor | None, prefix: int, of_images: Tensor) -> None:
    batch, tokens, width = grad.shape
    patches = tokens - prefix
    channels, patch_height, patch_width = weight.shape[1:]
    depth = channels * patch_height * patch_width
    arch = launch.architecture(grad)
    tile = launch.input_gradient(depth, weight.element_size(), arch, "none")
    launch.run(
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
        GROUP=_GROUP,
        PRECISION=launch.dot_precision(weight.dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _token_gradients(
    grad: Tensor,
    mask: Tensor | None,
    prefix_tokens: list[Tensor | None],
    of_pos_embed: Tensor | None,
    of_bias: Tensor | None,
    of_mask_token: Tensor | None,
) -> None:
    batch, tokens, width = grad.shape
    prefix = len(prefix_tokens)
    patches = tokens - prefix
    prefix_positions = of_pos_embed is not None and of_pos_embed.shape[1] == tokens
    of_prefix = prefix_positions or any(of is not None for of in prefix_tokens)
    of_patches = of_pos_embed is not None or of_bias is not None or of_mask_token is not None
    first, last = 0 if of_prefix else prefix, tokens if of_patches else prefix
    bias_partials, mask_token_partials = (
        None if of is None else torch.empty((patches, width), dtype=torch.float32, device=grad.device)
        for of in (of_bias, of_mask_token)
    )
    launch.run(
        token_gradients_kernel,
        (last - first) * triton.cdiv(width, _SUM_COLUMNS),
        grad.device,
        grad,
        mask if of_bias is not None or of_mask_token is not None else None,
        *prefix_tokens,
        *[None] * (2 - prefix),
        of_pos_embed,
        bias_partials,
        mask_token_partials,
        first,
        batch,
        patches,
        *grad.stride()[:2],
        width,
        PREFIX=prefix,
        PREFIX_POSITIONS=prefix_positions,
        BATCH_BLOCK=_LANES,
        COLUMN_BLOCK=_SUM_COLUMNS,
        num_warps=4,
    )
    for partials, of in ((bias_partials, of_bias), (mask_token_partials, of_mask_token)):
        if of is not None:
            _sum_partials(partials, of)


def _sum_partials(partials: Tensor, total: Tensor) -> None:
    """`partials` [count, …] summed into `total`."""
    count, columns = len(partials), total.numel()
    count_block = min(_LANES, triton.next_power_of_2(count))
    column_block = _LANES * _SUM_COLUMNS // count_block
    launch.run(
        sum_partials_kernel,
        triton.cdiv(columns, column_block),
        total.device,
        partials,
        total,
        count,
        columns,
        COUNT_BLOCK=count_block,
        COLUMN_BLOCK=column_block,
        num_warps=4,
    )
