"""Patch embedding as an implicit GEMM: images in, finished token sequence out, no patch matrix between."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import tile_of_program
from deit_fast.kernels.launching import hardware, run, tiles
from deit_fast.kernels.launching.layout import dense
from deit_fast.kernels.launching.metadata import described_product, patch_values
from deit_fast.kernels.patch_embed import settings


@triton.jit(
    do_not_specialize=["batch", "grid_height", "grid_width"],
    **described_product(
        "patch_embed_kernel",
        lambda a: (a["batch"] * a["grid_height"] * a["grid_width"], a["width"], patch_values(a)),
        ("std_ptr", "mask_ptr", "bias_ptr", "pos_embed_ptr"),
    ),
)
def patch_embed_kernel(
    images_ptr,  # [batch, CHANNELS, height, width], uint8 with mean and std
    weight_ptr,  # [width, CHANNELS, PATCH_HEIGHT, PATCH_WIDTH]
    bias_ptr,  # [width] or None
    pos_embed_ptr,  # [1, patches, width], with PREFIX_POSITIONS [1, PREFIX + patches, width], or None
    cls_token_ptr,  # [1, 1, width] or None
    dist_token_ptr,  # [1, 1, width] or None
    mask_token_ptr,  # [1, 1, width] with a mask, else None
    mask_ptr,  # [batch, patches], uint8, or None
    mean_ptr,  # [CHANNELS] or None
    std_ptr,  # [CHANNELS] or None
    tokens_ptr,  # [batch, PREFIX + patches, width]
    batch,
    grid_height,
    grid_width,
    image_batch,
    image_channel,
    image_row,
    image_column,
    width,
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    PREFIX_POSITIONS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`tokens = [cls; dist; patches @ weight.T + bias] + pos_embed` (Dosovitskiy et al. 2021, equation 1).

    With the distillation token of Touvron et al. 2021, section 4; masked patches are the mask token (Bao et al. 2022);
    bytes are normalised as (x / 255 - mean) / std. The first programs compute tiles of patch rows, the rest write the
    prefix rows.

    PREFIX counts CLS and distillation rows; PREFIX_POSITIONS says whether they have position embeddings.
    """
    column_tiles = tl.cdiv(width, COLUMN_BLOCK)
    patches = grid_height * grid_width
    row_tiles = tl.cdiv(batch * patches, ROW_BLOCK)
    if tl.program_id(0) >= row_tiles * column_tiles:
        _write_prefix(
            tl.program_id(0) - row_tiles * column_tiles, pos_embed_ptr, cls_token_ptr, dist_token_ptr, tokens_ptr,
            batch, patches, width, PREFIX, PREFIX_POSITIONS, ROW_BLOCK, COLUMN_BLOCK,
        )  # fmt: skip
    else:
        DEPTH: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
        tile_m, tile_n = tile_of_program(row_tiles, column_tiles, GROUP)
        row = tile_m.to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        row_mask = row < batch.to(tl.int64) * patches
        sample = row // patches
        patch = row % patches
        top = patch // grid_width * PATCH_HEIGHT
        left = patch % grid_width * PATCH_WIDTH
        corners = images_ptr + sample * image_batch + top * image_row + left * image_column
        column = tile_n * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
        column_mask = column < width

        product = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
        for start in range(0, DEPTH, DEPTH_BLOCK):
            k = start + tl.arange(0, DEPTH_BLOCK)
            k_mask = k < DEPTH
            channel = k // (PATCH_HEIGHT * PATCH_WIDTH)
            offset = (
                channel.to(tl.int64) * image_channel
                + (k // PATCH_WIDTH % PATCH_HEIGHT).to(tl.int64) * image_row
                + (k % PATCH_WIDTH).to(tl.int64) * image_column
            )
            pixels = tl.load(corners[:, None] + offset[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0)
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + channel, mask=k_mask, other=0.0).to(tl.float32)
                std = tl.load(std_ptr + channel, mask=k_mask, other=1.0).to(tl.float32)
                pixels = (pixels.to(tl.float32) / 255.0 - mean[None, :]) / std[None, :]
            weight = tl.load(
                weight_ptr + column[None, :] * DEPTH + k[:, None],
                mask=k_mask[:, None] & column_mask[None, :],
                other=0.0,
            )
            product = tl.dot(pixels.to(weight.dtype), weight, product, input_precision=PRECISION)

        if bias_ptr is not None:
            product += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        if mask_ptr is not None:
            masked = tl.load(mask_ptr + row, mask=row_mask, other=0) != 0
            mask_token = tl.load(mask_token_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
            product = tl.where(masked[:, None], mask_token[None, :], product)
        tile_mask = row_mask[:, None] & column_mask[None, :]
        if pos_embed_ptr is not None:
            position = patch
            if PREFIX_POSITIONS:
                position = patch + PREFIX
            pos_embed = pos_embed_ptr + position[:, None] * width + column[None, :]
            product += tl.load(pos_embed, mask=tile_mask, other=0.0).to(tl.float32)
        token = sample * (patches + PREFIX) + PREFIX + patch
        tl.store(
            tokens_ptr + token[:, None] * width + column[None, :],
            product.to(tokens_ptr.dtype.element_ty),
            mask=tile_mask,
        )


@triton.jit
def _write_prefix(
    tile, pos_embed_ptr, cls_token_ptr, dist_token_ptr, tokens_ptr, batch, patches, width,
    PREFIX: tl.constexpr, PREFIX_POSITIONS: tl.constexpr,
    ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of the CLS (and distillation) rows of ROW_BLOCK samples; `dist_token_ptr` may be absent."""
    column_tiles = tl.cdiv(width, COLUMN_BLOCK)
    column = tile % column_tiles * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < width
    sample = (tile // column_tiles).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    mask = (sample < batch)[:, None] & column_mask[None, :]
    for i in tl.static_range(PREFIX):
        token_ptr = cls_token_ptr if i == 0 else dist_token_ptr
        token = tl.load(token_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
        if PREFIX_POSITIONS:
            token += tl.load(pos_embed_ptr + i * width + column, mask=column_mask, other=0.0).to(tl.float32)
        rows = tokens_ptr + (sample * (patches + PREFIX) + i)[:, None] * width + column[None, :]
        value = tl.broadcast_to(token[None, :], (ROW_BLOCK, COLUMN_BLOCK))
        tl.store(rows, value.to(tokens_ptr.dtype.element_ty), mask=mask)


def patch_embed(
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
) -> Tensor:
    """Tokens [B, R + P, D] of images [B, C, H, W], any strides; R of them are the prefix.

    Their dtype is what weight, positions and prefix tokens promote to.
    weight: [D, C, p, q]; bias: [D]; pos_embed: [1, P, D] or [1, R + P, D]; each of the tokens: [1, 1, D]. mask: bool
    [B, P], with mask_token. mean, std: [C], or None where images are normalised already.
    """
    batch, _, height, image_width = images.shape
    width, channels, patch_height, patch_width = weight.shape
    grid_height, grid_width = height // patch_height, image_width // patch_width
    patches = grid_height * grid_width
    prefix_tokens = [t.contiguous() for t in (cls_token, dist_token) if t is not None]
    prefix = len(prefix_tokens)
    dtype = weight.dtype
    for other in (pos_embed, *prefix_tokens):
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    tokens = torch.empty((batch, prefix + patches, width), dtype=dtype, device=images.device)
    if tokens.numel() == 0:
        return tokens
    arch = hardware.architecture(images)
    depth = channels * patch_height * patch_width
    tile = settings.patch_embed(width, patch_width, depth, weight.element_size(), arch)
    column_tiles = triton.cdiv(width, tile.columns)
    programs = triton.cdiv(batch * patches, tile.rows) * column_tiles
    if prefix:
        programs += triton.cdiv(batch, tile.rows) * column_tiles
    run.run(
        patch_embed_kernel,
        programs,
        images.device,
        images,
        weight.contiguous(),
        dense(bias),
        dense(pos_embed),
        *prefix_tokens,
        *[None] * (2 - prefix),
        dense(mask_token),
        None if mask is None else mask.contiguous().view(torch.uint8),
        dense(mean),
        dense(std),
        tokens,
        batch,
        grid_height,
        grid_width,
        *images.stride(),
        width,
        CHANNELS=channels,
        PATCH_HEIGHT=patch_height,
        PATCH_WIDTH=patch_width,
        PREFIX=prefix,
        PREFIX_POSITIONS=pos_embed is not None and prefix > 0 and pos_embed.shape[1] == prefix + patches,
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        DEPTH_BLOCK=tile.depth,
        GROUP=tiles.GROUP,
        PRECISION=hardware.dot_precision(weight.dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return tokens
