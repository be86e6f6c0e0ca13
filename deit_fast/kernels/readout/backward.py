"""Gradients of readout attention, without atomics.

With c, s, p and summed as in the forward and dz the gradient of summed (LayerNorm's weight already applied to it):

    d = dz − mean(dz),  dp_n = d · x̂_n,  delta = dz · summed = Σ_n p_n dp_n,  ds_n = p_n (dp_n − delta)
    dx̂_n = Σ_queries p_n d + ds_n c,  dc = Σ_n ds_n x̂_n
    dx_n = rstd_n (dx̂_n − x̂_n Σ_queries (p_n dp_n + ds_n s_n) / D)

d and c sum to 0, and so does dx̂: of the two sums over the width in LayerNorm's backward one is 0, and the other,
dx̂ · x̂, is made of numbers at hand. A program owns a block of an image's tokens, for dx and its part of dc.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.launching import hardware, run
from deit_fast.kernels.launching.layout import TRITON_DTYPES, dense, unit_stride
from deit_fast.kernels.launching.metadata import described
from deit_fast.kernels.readout import settings
from deit_fast.kernels.readout.forward import LN_2, LOG2_E, normalised_tiles, query_rows


@triton.jit(
    **described(
        "readout_backward_kernel",
        lambda a: (len(a["x_ptr"]), a["queries"], a["tokens"], a["WIDTH"]),
        ("norm_weight_ptr",),
        flops=lambda a: 10 * a["x_ptr"].numel() * a["queries"],
    )
)
def readout_backward_kernel(
    x_ptr,  # [B, tokens, WIDTH]
    absorbed_ptr,  # [B, R, heads, WIDTH]
    norm_weight_ptr,  # [WIDTH] or None
    summed_ptr,  # [B, R, heads, WIDTH], float32
    log_sum_exp_ptr,  # [B, R, heads], float32
    dsummed_ptr,  # [B, R, heads, WIDTH]
    dx_ptr,  # [B, tokens, WIDTH]
    partials_ptr,  # [B, blocks, R, heads, WIDTH], float32
    tokens,
    heads,
    queries,
    eps,
    x_batch,
    x_token,
    absorbed_batch,
    absorbed_row,
    absorbed_head,
    dsummed_batch,
    dsummed_row,
    dsummed_head,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx of TOKEN_BLOCK tokens, and what they add to dc in partials, as above. Both are dense, as summed."""
    blocks = tl.cdiv(tokens, TOKEN_BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    token_mask = token < tokens
    x_rows = x_ptr + batch * x_batch + token.to(tl.int64) * x_token
    normalised, rstd = normalised_tiles(x_rows, token_mask, eps, WIDTH, CHUNK, CHUNKS, DTYPE)
    absorbed_ptr += batch * absorbed_batch
    dsummed_ptr += batch * dsummed_batch
    summed_ptr += batch * queries * WIDTH
    log_sum_exp_ptr += batch * queries

    absorbed_means, dsummed_means, deltas, scores, of_weights = (), (), (), (), ()
    for group in tl.static_range(GROUPS):
        query = group * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
        query_mask = query < queries
        absorbed_rows = query_rows(absorbed_ptr, query, heads, absorbed_row, absorbed_head)
        dsummed_rows = query_rows(dsummed_ptr, query, heads, dsummed_row, dsummed_head)
        absorbed_mean, dsummed_mean, delta = _row_means(
            absorbed_rows, norm_weight_ptr, dsummed_rows, summed_ptr + query * WIDTH, query_mask, WIDTH, CHUNK
        )
        absorbed_means += (absorbed_mean,)
        dsummed_means += (dsummed_mean,)
        deltas += (delta,)
        scores += (tl.zeros([QUERY_BLOCK, TOKEN_BLOCK], dtype=tl.float32),)
        of_weights += (tl.zeros([QUERY_BLOCK, TOKEN_BLOCK], dtype=tl.float32),)

    # Chunks outside, groups inside: each tile of x̂ is an operand for all groups and then no more.
    for i in tl.static_range(CHUNKS):
        new_scores, new_of_weights = (), ()
        for group in tl.static_range(GROUPS):
            query = group * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
            query_mask = query < queries
            absorbed_rows = query_rows(absorbed_ptr, query, heads, absorbed_row, absorbed_head)
            dsummed_rows = query_rows(dsummed_ptr, query, heads, dsummed_row, dsummed_head)
            tile = _centred_tile(
                absorbed_rows, norm_weight_ptr, query_mask, absorbed_means[group], True, i, WIDTH, CHUNK, DTYPE
            )
            new_scores += (tl.dot(tile, tl.trans(normalised[i]), scores[group], input_precision=PRECISION),)
            tile = _centred_tile(dsummed_rows, None, query_mask, dsummed_means[group], False, i, WIDTH, CHUNK, DTYPE)
            new_of_weights += (tl.dot(tile, tl.trans(normalised[i]), of_weights[group], input_precision=PRECISION),)
        scores, of_weights = new_scores, new_of_weights

    # Scores are in units of log 2, as in the forward; `in_log_2` takes back what their gradient times c has of that.
    weights, of_scores, in_log_2 = (), (), ()
    projection = tl.zeros([TOKEN_BLOCK], dtype=tl.float32)
    for group in tl.static_range(GROUPS):
        query = group * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
        log_sum_exp = tl.load(log_sum_exp_ptr + query, mask=query < queries, other=0.0) * LOG2_E
        weight = tl.where(token_mask[None, :], tl.exp2(scores[group] - log_sum_exp[:, None]), 0.0)
        of_score = tl.where(token_mask[None, :], weight * (of_weights[group] - deltas[group][:, None]), 0.0)
        projection += tl.sum(weight * of_weights[group] + of_score * LN_2 * scores[group], axis=0)
        weights += (weight.to(DTYPE),)
        of_scores += (of_score.to(DTYPE),)
        in_log_2 += ((of_score * LN_2).to(DTYPE),)

    projection /= WIDTH
    partials_ptr += tl.program_id(0).to(tl.int64) * queries * WIDTH
    dx_rows = dx_ptr + (batch * tokens + token)[:, None] * WIDTH
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        column_mask = (column < WIDTH)[None, :]
        gradient = tl.zeros([TOKEN_BLOCK, CHUNK], dtype=tl.float32)
        for group in tl.static_range(GROUPS):
            query = group * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
            query_mask = query < queries
            # Loaded again, from cache: kept on chip, all of their width would crowd out a second program.
            absorbed_rows = query_rows(absorbed_ptr, query, heads, absorbed_row, absorbed_head)
            dsummed_rows = query_rows(dsummed_ptr, query, heads, dsummed_row, dsummed_head)
            tile = _centred_tile(dsummed_rows, None, query_mask, dsummed_means[group], False, i, WIDTH, CHUNK, DTYPE)
            gradient = tl.dot(tl.trans(weights[group]), tile, gradient, input_precision=PRECISION)
            tile = _centred_tile(
                absorbed_rows, norm_weight_ptr, query_mask, absorbed_means[group], True, i, WIDTH, CHUNK, DTYPE
            )
            gradient = tl.dot(tl.trans(in_log_2[group]), tile, gradient, input_precision=PRECISION)
            partial = tl.dot(of_scores[group], normalised[i], input_precision=PRECISION)
            mask = query_mask[:, None] & column_mask
            tl.store(partials_ptr + query[:, None] * WIDTH + column[None, :], partial, mask=mask)
        dx = rstd[:, None] * (gradient - normalised[i].to(tl.float32) * projection[:, None])
        tl.store(dx_rows + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=token_mask[:, None] & column_mask)


@triton.jit
def _row_means(
    absorbed_rows, weight_ptr, dsummed_rows, summed_rows, row_mask, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):
    """By row: the means of weight · absorbed and of dsummed, and dsummed · summed."""
    zeros = tl.zeros([row_mask.shape[0], CHUNK], dtype=tl.float32)
    absorbed_total, dsummed_total, product = zeros, zeros, zeros
    for start in range(0, WIDTH, CHUNK):
        column = start + tl.arange(0, CHUNK)
        mask = row_mask[:, None] & (column < WIDTH)[None, :]
        absorbed_total += _weighted(absorbed_rows, weight_ptr, column, mask, WIDTH)
        dsummed = _weighted(dsummed_rows, None, column, mask, WIDTH)
        dsummed_total += dsummed
        product += dsummed * tl.load(summed_rows[:, None] + column[None, :], mask=mask, other=0.0)
    return tl.sum(absorbed_total, axis=1) / WIDTH, tl.sum(dsummed_total, axis=1) / WIDTH, tl.sum(product, axis=1)


@triton.jit
def _weighted(rows, weight_ptr, column, mask, WIDTH: tl.constexpr):
    tile = tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        tile *= tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    return tile


@triton.jit
def _centred_tile(
    rows, weight_ptr, row_mask, mean, IN_LOG_2: tl.constexpr, i,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Tile `i` of weight · row − mean in DTYPE, times log2(e) if IN_LOG_2."""
    column = i * CHUNK + tl.arange(0, CHUNK)
    mask = row_mask[:, None] & (column < WIDTH)[None, :]
    tile = _weighted(rows, weight_ptr, column, mask, WIDTH) - mean[:, None]
    if IN_LOG_2:
        tile *= LOG2_E
    return tl.where(mask, tile, 0.0).to(DTYPE)


def readout_backward(
    x: Tensor,
    absorbed: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    summed: Tensor,
    log_sum_exp: Tensor,
    dsummed: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dx [B, N, D] in x's dtype and dc [B, R, H, D] in float32, c being norm_weight · absorbed less its mean.

    summed and log_sum_exp are the forward's; dsummed: [B, R, H, D], any dtype and strides; dots of `dtype`.
    """
    batch, tokens, width = x.shape
    rows, heads = absorbed.shape[1:3]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0 or absorbed.numel() == 0:
        return dx.zero_(), torch.zeros(absorbed.shape, dtype=torch.float32, device=x.device)
    x, absorbed, dsummed = unit_stride(x), unit_stride(absorbed), unit_stride(dsummed)
    arch = hardware.architecture(x)
    tile = settings.readout_backward(width, rows * heads, dtype.itemsize, arch)
    blocks = triton.cdiv(tokens, tile.tokens)
    partials = torch.empty((batch, blocks, rows, heads, width), dtype=torch.float32, device=x.device)
    run.run(
        readout_backward_kernel,
        batch * blocks,
        x.device,
        x,
        absorbed,
        dense(norm_weight),
        dense(summed),
        dense(log_sum_exp),
        dsummed,
        dx,
        partials,
        tokens,
        heads,
        rows * heads,
        eps,
        *x.stride()[:2],
        *absorbed.stride()[:3],
        *dsummed.stride()[:3],
        WIDTH=width,
        CHUNK=tile.chunk,
        CHUNKS=triton.cdiv(width, tile.chunk),
        QUERY_BLOCK=tile.queries,
        GROUPS=triton.cdiv(rows * heads, tile.queries),
        TOKEN_BLOCK=tile.tokens,
        DTYPE=TRITON_DTYPES[dtype],
        PRECISION=hardware.dot_precision(dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dx, partials.sum(1)
