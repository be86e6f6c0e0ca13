"""Gradients of bias, positions and tokens: sums over the batch, in an order that does not depend on the run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.launching import run
from deit_fast.kernels.launching.metadata import described

# Terms added at once where a kernel only sums, and columns: two thousand elements a program, 128 bytes of a row.
_LANES, _SUM_COLUMNS = 32, 64


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
    grad_ptr,  # [batch, PREFIX + patches, width]
    mask_ptr,  # [batch, patches], uint8, or None
    first_token_ptr,  # [width] or None
    second_token_ptr,  # [width] or None
    pos_embed_ptr,  # [patches, width], with PREFIX_POSITIONS [PREFIX + patches, width], or None
    bias_partials_ptr,  # [patches, width], float32, or None
    mask_token_partials_ptr,  # [patches, width], float32, or None
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
    partials_ptr,  # [count, columns], float32
    total_ptr,  # [columns]
    count,
    columns,
    COUNT_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    """Column sums of float32 [count, columns], in an order that does not depend on the run."""
    column = tl.program_id(0).to(tl.int64) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < columns
    total = tl.zeros([COLUMN_BLOCK, COUNT_BLOCK], dtype=tl.float32)
    for start in range(0, count, COUNT_BLOCK):
        i = start + tl.arange(0, COUNT_BLOCK).to(tl.int64)
        partials = partials_ptr + i[None, :] * columns + column[:, None]
        total += tl.load(partials, mask=column_mask[:, None] & (i < count)[None, :], other=0.0)
    tl.store(total_ptr + column, tl.sum(total, axis=1).to(total_ptr.dtype.element_ty), mask=column_mask)


def token_gradients(
    grad: Tensor,
    mask: Tensor | None,
    prefix_tokens: list[Tensor | None],
    of_pos_embed: Tensor | None,
    of_bias: Tensor | None,
    of_mask_token: Tensor | None,
) -> None:
    """Fills what is given of the gradients, each like its parameter, from grad [B, R + P, D]; mask: uint8 [B, P].

    prefix_tokens: of the R prefix tokens, [1, 1, D], None where one has no gradient.
    """
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
    run.run(
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
        if partials is not None and of is not None:
            sum_partials(partials, of)


def sum_partials(partials: Tensor, total: Tensor) -> None:
    """`partials` [count, …] summed into `total`."""
    count, columns = len(partials), total.numel()
    count_block = min(_LANES, triton.next_power_of_2(count))
    column_block = _LANES * _SUM_COLUMNS // count_block
    run.run(
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
