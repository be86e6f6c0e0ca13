"""Attention from the few rows that a model reads, straight from x: no keys, no values, one pass.

With a the queries times the keys' weight and the scale, γ LayerNorm's weight and x̂ the normalised rows (its bias
shifts all scores of a query alike):

    c = γ a − mean(γ a),  s_n = c · x̂_n,  p = softmax_n(s),  summed = Σ_n p_n x̂_n

Subtracting c's mean changes no score, since x̂ sums to 0, and spares the backward a sum over the width. A row lies on
chip as a tuple of tiles of one width, since tiles are powers of two and DeiT's widths are not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.launching import hardware, run
from deit_fast.kernels.launching.hardware import NARROW_READOUT
from deit_fast.kernels.launching.layout import TRITON_DTYPES, dense, unit_stride
from deit_fast.kernels.launching.metadata import described
from deit_fast.kernels.readout import settings

_WIDEST = 1280
# Split into what TF32 multiplies, wider rows fit neither in registers nor in 99 KiB of shared memory.
_WIDEST_FLOAT32 = 256

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    **described(
        "readout_kernel",
        lambda a: (len(a["x_ptr"]), a["queries"], a["tokens"], a["WIDTH"]),
        ("norm_weight_ptr",),
        flops=lambda a: 4 * a["x_ptr"].numel() * a["queries"],
    )
)
def readout_kernel(
    x_ptr,  # [B, tokens, WIDTH]
    absorbed_ptr,  # [B, R, heads, WIDTH]
    norm_weight_ptr,  # [WIDTH] or None
    summed_ptr,  # [B, R, heads, WIDTH], float32
    log_sum_exp_ptr,  # [B, R, heads], float32
    tokens,
    heads,
    queries,
    eps,
    x_batch,
    x_token,
    absorbed_batch,
    absorbed_row,
    absorbed_head,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`summed = softmax(c · x̂ᵀ) x̂`, by online softmax (Milakov & Gimelshein 2018); c and x̂ as above.

    One program: QUERY_BLOCK of an image's `queries` = R·H over all its tokens. summed and log_sum_exp are dense.
    """
    blocks = tl.cdiv(queries, QUERY_BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    query = (tl.program_id(0) % blocks) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    query_mask = query < queries
    absorbed_ptr += batch * absorbed_batch
    absorbed_rows = query_rows(absorbed_ptr, query, heads, absorbed_row, absorbed_head)
    # Scores in units of log 2: exp2 takes them as they are, where a factor there would cost a rounding.
    centred = centred_rows(absorbed_rows, norm_weight_ptr, query_mask, WIDTH, CHUNK, CHUNKS, DTYPE)
    x_ptr += batch * x_batch

    summed = zero_rows(QUERY_BLOCK, CHUNK, CHUNKS)
    maximum = tl.full([QUERY_BLOCK], float("-inf"), dtype=tl.float32)
    denominator = tl.zeros([QUERY_BLOCK], dtype=tl.float32)
    for first in range(0, tokens, TOKEN_BLOCK):
        token = first + tl.arange(0, TOKEN_BLOCK)
        token_mask = token < tokens
        x_rows = x_ptr + token.to(tl.int64) * x_token
        normalised, _rstd = normalised_tiles(x_rows, token_mask, eps, WIDTH, CHUNK, CHUNKS, DTYPE)
        scores = dot_rows(centred, normalised, QUERY_BLOCK, TOKEN_BLOCK, CHUNKS, PRECISION)
        scores = tl.where(token_mask[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        maximum = new_maximum
        denominator = denominator * decay + tl.sum(weights, axis=1)
        summed = scaled_rows(summed, decay, CHUNKS)
        summed = add_dots(summed, weights.to(DTYPE), normalised, CHUNKS, PRECISION)

    row = batch * queries + query
    tl.store(log_sum_exp_ptr + row, (maximum + tl.log2(denominator)) * LN_2, mask=query_mask)
    summed_rows = summed_ptr + row[:, None] * WIDTH
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        mask = query_mask[:, None] & (column < WIDTH)[None, :]
        tl.store(summed_rows + column[None, :], summed[i] / denominator[:, None], mask=mask)


@triton.jit
def query_rows(ptr, query, heads, row_stride, head_stride):
    """The rows of queries in a tensor [R, H, D]."""
    return ptr + (query // heads).to(tl.int64) * row_stride + (query % heads).to(tl.int64) * head_stride


@triton.jit
def zero_rows(ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(CHUNKS):
        tiles += (tl.zeros([ROWS, CHUNK], dtype=tl.float32),)
    return tiles


@triton.jit
def load_rows(rows, row_mask, WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The rows at pointers `rows` as CHUNKS float32 tiles, 0 where masked."""
    tiles = ()
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        mask = row_mask[:, None] & (column < WIDTH)[None, :]
        tiles += (tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def centred_rows(
    rows, weight_ptr, row_mask,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`w − mean(w)` with w = log2(e) · weight · row, in DTYPE. `weight_ptr` may be None."""
    tiles = load_rows(rows, row_mask, WIDTH, CHUNK, CHUNKS)
    weighted = ()
    total = tl.sum(tiles[0], axis=1) * 0.0
    for i in tl.static_range(CHUNKS):
        tile = tiles[i] * LOG2_E
        if weight_ptr is not None:
            column = i * CHUNK + tl.arange(0, CHUNK)
            tile *= tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
        weighted += (tile,)
        total += tl.sum(tile, axis=1)
    return less_mean(weighted, total / WIDTH, WIDTH, CHUNK, CHUNKS, DTYPE)


@triton.jit
def less_mean(tiles, mean, WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, DTYPE: tl.constexpr):
    """`tiles` − mean in DTYPE; what lies past the width stays 0."""
    result = ()
    for i in tl.static_range(CHUNKS):
        tile = tiles[i] - mean[:, None]
        if (i + 1) * CHUNK > WIDTH:
            tile = tl.where((i * CHUNK + tl.arange(0, CHUNK) < WIDTH)[None, :], tile, 0.0)
        result += (tile.to(DTYPE),)
    return result


@triton.jit
def normalised_tiles(
    rows, row_mask, eps, WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, DTYPE: tl.constexpr
):
    """`(x − mean) · rstd` in DTYPE, 0 where masked, and rstd in float32."""
    tiles = load_rows(rows, row_mask, WIDTH, CHUNK, CHUNKS)
    total = tl.sum(tiles[0], axis=1)
    for i in tl.static_range(1, CHUNKS):
        total += tl.sum(tiles[i], axis=1)
    tiles = less_mean(tiles, total / WIDTH, WIDTH, CHUNK, CHUNKS, tl.float32)
    # What rounding left in the mean: a constant row must come out as zeros, not as rounding errors over sqrt(eps).
    total = tl.sum(tiles[0], axis=1)
    for i in tl.static_range(1, CHUNKS):
        total += tl.sum(tiles[i], axis=1)
    tiles = less_mean(tiles, total / WIDTH, WIDTH, CHUNK, CHUNKS, tl.float32)
    squares = tl.sum(tiles[0] * tiles[0], axis=1)
    for i in tl.static_range(1, CHUNKS):
        squares += tl.sum(tiles[i] * tiles[i], axis=1)
    # Masked rows are 0 whatever eps is.
    rstd = tl.where(row_mask, 1.0 / tl.sqrt(squares / WIDTH + eps), 0.0)
    normalised = ()
    for i in tl.static_range(CHUNKS):
        normalised += ((tiles[i] * rstd[:, None]).to(DTYPE),)
    return normalised, rstd


@triton.jit
def dot_rows(
    left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The products of every row of `left` with every row of `right`: [LEFT, RIGHT]."""
    product = tl.zeros([LEFT, RIGHT], dtype=tl.float32)
    for i in tl.static_range(CHUNKS):
        product = tl.dot(left[i], tl.trans(right[i]), product, input_precision=PRECISION)
    return product


@triton.jit
def scaled_rows(tiles, scale, CHUNKS: tl.constexpr):
    scaled = ()
    for i in tl.static_range(CHUNKS):
        scaled += (tiles[i] * scale[:, None],)
    return scaled


@triton.jit
def add_dots(tiles, weights, rows, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """`tiles` + weights · rows."""
    added = ()
    for i in tl.static_range(CHUNKS):
        added += (tl.dot(weights, rows[i], tiles[i], input_precision=PRECISION),)
    return added


def unsupported(width: int, dtype: torch.dtype | None = None) -> str | None:
    """`dtype`: that of the dots; where not given, 16 bits."""
    widest = _WIDEST_FLOAT32 if dtype is torch.float32 else _WIDEST
    return f"rows of {width} do not fit on chip (at most {widest})" if width > widest else None


def forward_unsupported(x: Tensor, dtype: torch.dtype) -> str | None:
    """`unsupported` of forward, whose queries every wave holds whole."""
    arch, width = hardware.architecture(x), x.shape[-1]
    if arch in NARROW_READOUT and width > NARROW_READOUT[arch]:
        return f"rows of {width} do not fit in registers on {arch} (at most {NARROW_READOUT[arch]})"
    return unsupported(width, dtype)


def readout(
    x: Tensor, absorbed: Tensor, norm_weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """summed [B, R, H, D] and the softmax's log-sum-exp [B, R, H], both float32; dots of `dtype`.

    x: [B, N, D]; absorbed: [B, R, H, D]; norm_weight: [D] or None.
    """
    batch, tokens, width = x.shape
    rows, heads = absorbed.shape[1:3]
    summed = torch.empty((batch, rows, heads, width), dtype=torch.float32, device=x.device)
    log_sum_exp = torch.empty((batch, rows, heads), dtype=torch.float32, device=x.device)
    if summed.numel() == 0:
        return summed, log_sum_exp
    x, absorbed = unit_stride(x), unit_stride(absorbed)
    arch = hardware.architecture(x)
    tile = settings.readout(width, dtype.itemsize, arch)
    run.run(
        readout_kernel,
        batch * triton.cdiv(rows * heads, tile.queries),
        x.device,
        x,
        absorbed,
        dense(norm_weight),
        summed,
        log_sum_exp,
        tokens,
        heads,
        rows * heads,
        eps,
        *x.stride()[:2],
        *absorbed.stride()[:3],
        WIDTH=width,
        CHUNK=tile.chunk,
        CHUNKS=triton.cdiv(width, tile.chunk),
        QUERY_BLOCK=tile.queries,
        TOKEN_BLOCK=tile.tokens,
        DTYPE=TRITON_DTYPES[dtype],
        PRECISION=hardware.dot_precision(dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return summed, log_sum_exp
