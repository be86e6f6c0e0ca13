"""LayerNorm, QKV and attention in one kernel, where the keys and values of a whole head stay on chip.

q, k and v never reach memory but for q, which waits in the output's place for its turn, hot in cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels import launch
from deit_fast.kernels.attention import attention, attention_qkv
from deit_fast.kernels.device import normalise, online_softmax, row_statistics
from deit_fast.kernels.layout import all_or_none, dense, one_stride, unit_stride
from deit_fast.kernels.linear import layer_norm_linear, layer_norm_qkv
from deit_fast.kernels.metadata import described

_WIDEST = 384
# Keys and values of so many tokens, of heads this wide, are 64 KiB in 16 bits.
_MOST_TOKENS = 256
_HEAD_DIMS = (32, 64)
_STATISTICS_BLOCK = tl.constexpr(64)


@triton.jit(
    **described(
        "layer_norm_attention_kernel",
        lambda a: (len(a["x_ptr"]), a["heads"], a["tokens"], a["HEAD_DIM"]),
        ("norm_weight_ptr", "q_bias_ptr"),
        flops=lambda a: a["x_ptr"].numel() * (6 * a["heads"] * a["HEAD_DIM"]) + 4 * a["out_ptr"].numel() * a["tokens"],
    )
)
def layer_norm_attention_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    q_weight_ptr,
    k_weight_ptr,
    v_weight_ptr,
    q_bias_ptr,
    k_bias_ptr,
    v_bias_ptr,
    out_ptr,
    tokens,
    heads,
    scale,
    x_batch,
    x_token,
    weight_stride,
    eps,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """One program is one head of one sample. BLOCKS × BLOCK tokens and a TAIL of the rest, 0 where nothing is."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    x_ptr += batch * x_batch
    out_token = heads * HEAD_DIM
    out_ptr += batch * tokens * out_token + head * HEAD_DIM
    q_weight_ptr += head * HEAD_DIM * weight_stride
    k_weight_ptr += head * HEAD_DIM * weight_stride
    v_weight_ptr += head * HEAD_DIM * weight_stride
    if q_bias_ptr is not None:
        q_bias_ptr += head * HEAD_DIM
        k_bias_ptr += head * HEAD_DIM
        v_bias_ptr += head * HEAD_DIM

    # The tail's queries come first and attend as keys are made: later they would want them in another layout.
    first_of_tail: tl.constexpr = BLOCKS * BLOCK
    k_tail, v_tail = None, None
    if TAIL > 0:
        q_tail, k_tail, v_tail = _project(
            x_ptr, norm_weight_ptr, norm_bias_ptr, q_weight_ptr, k_weight_ptr, v_weight_ptr,
            q_bias_ptr, k_bias_ptr, v_bias_ptr, first_of_tail, tokens, x_token, weight_stride, eps,
            WIDTH, HEAD_DIM, TAIL, WIDTH_BLOCK, True,
        )  # fmt: skip
        maximum, denominator, out = _nothing_seen(TAIL, HEAD_DIM)
        maximum, denominator, out = _attend_block(
            q_tail, k_tail, v_tail, maximum, denominator, out, first_of_tail, tokens, scale, TAIL, True
        )  # fmt: skip
    keys, values = (), ()
    for block in tl.static_range(BLOCKS):
        q, k, v = _project(
            x_ptr, norm_weight_ptr, norm_bias_ptr, q_weight_ptr, k_weight_ptr, v_weight_ptr,
            q_bias_ptr, k_bias_ptr, v_bias_ptr, block * BLOCK, tokens, x_token, weight_stride, eps,
            WIDTH, HEAD_DIM, BLOCK, WIDTH_BLOCK, False,
        )  # fmt: skip
        tl.store(_rows(out_ptr, block * BLOCK, out_token, BLOCK, HEAD_DIM), q)
        if TAIL > 0:
            maximum, denominator, out = _attend_block(
                q_tail, k, v, maximum, denominator, out, block * BLOCK, tokens, scale, BLOCK, False
            )  # fmt: skip
        keys += (k,)
        values += (v,)
    if TAIL > 0:
        rows = _rows(out_ptr, first_of_tail, out_token, TAIL, HEAD_DIM)
        row_mask = first_of_tail + tl.arange(0, TAIL) < tokens
        tl.store(rows, (out / denominator[:, None]).to(out_ptr.dtype.element_ty), mask=row_mask[:, None])

    # Other threads than those that stored the queries load them.
    tl.debug_barrier()
    for first_query in range(0, first_of_tail, BLOCK):
        _attend_in_place(
            _rows(out_ptr, first_query, out_token, BLOCK, HEAD_DIM), keys, values, k_tail, v_tail, tokens, scale,
            HEAD_DIM, BLOCKS, BLOCK, TAIL,
        )  # fmt: skip


@triton.jit
def _rows(ptr, first, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return ptr + (first + tl.arange(0, ROWS))[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _project(
    x_ptr, norm_weight_ptr, norm_bias_ptr, q_weight_ptr, k_weight_ptr, v_weight_ptr,
    q_bias_ptr, k_bias_ptr, v_bias_ptr, first, tokens, x_token, weight_stride, eps,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH_BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values [ROWS, HEAD_DIM] of the tokens from `first` on."""
    row = first + tl.arange(0, ROWS)
    row_mask = row < tokens
    x_rows = x_ptr + row[:, None] * x_token
    mean, rstd = row_statistics(x_rows, row_mask, eps, WIDTH, ROWS, _STATISTICS_BLOCK)
    q = _product(
        x_rows, row_mask, mean, rstd, norm_weight_ptr, norm_bias_ptr, q_weight_ptr, q_bias_ptr, weight_stride,
        WIDTH, HEAD_DIM, ROWS, WIDTH_BLOCK,
    )  # fmt: skip
    k = _product(
        x_rows, row_mask, mean, rstd, norm_weight_ptr, norm_bias_ptr, k_weight_ptr, k_bias_ptr, weight_stride,
        WIDTH, HEAD_DIM, ROWS, WIDTH_BLOCK,
    )  # fmt: skip
    v = _product(
        x_rows, row_mask, mean, rstd, norm_weight_ptr, norm_bias_ptr, v_weight_ptr, v_bias_ptr, weight_stride,
        WIDTH, HEAD_DIM, ROWS, WIDTH_BLOCK,
    )  # fmt: skip
    if MASKED:
        # Rows past the last token came out as the bias: where that overflows, 0 times it would not be 0.
        v = tl.where(row_mask[:, None], v, 0.0)
    return q, k, v


@triton.jit
def _product(
    x_rows, row_mask, mean, rstd, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, weight_stride,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
):  # fmt: skip
    """One projection at a time: x comes out of cache again, and the accumulators of three would leave no registers."""
    column = tl.arange(0, HEAD_DIM)
    product = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
    for start in range(0, WIDTH, WIDTH_BLOCK):
        k = start + tl.arange(0, WIDTH_BLOCK)
        weight = tl.load(weight_ptr + column[None, :] * weight_stride + k[:, None])
        x = tl.load(x_rows + k[None, :], mask=row_mask[:, None], other=0.0).to(tl.float32)
        x = normalise(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, k, k < WIDTH)
        product = tl.dot(x.to(weight.dtype), weight, product)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    return product.to(weight_ptr.dtype.element_ty)


@triton.jit
def _nothing_seen(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    return maximum, tl.zeros([ROWS], dtype=tl.float32), tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)


@triton.jit
def _attend_in_place(
    rows, keys, values, k_tail, v_tail, tokens, scale,
    HEAD_DIM: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The queries at `rows` over all keys; the output takes their place."""
    q = tl.load(rows)
    # Before the output takes the place of queries that other threads load.
    tl.debug_barrier()
    maximum, denominator, out = _nothing_seen(BLOCK, HEAD_DIM)
    for block in tl.static_range(BLOCKS):
        maximum, denominator, out = _attend_block(
            q, keys[block], values[block], maximum, denominator, out, block * BLOCK, tokens, scale, BLOCK, False
        )  # fmt: skip
    if TAIL > 0:
        maximum, denominator, out = _attend_block(
            q, k_tail, v_tail, maximum, denominator, out, BLOCKS * BLOCK, tokens, scale, TAIL, True
        )  # fmt: skip
    tl.store(rows, (out / denominator[:, None]).to(q.dtype))


@triton.jit
def _attend_block(
    q, k, v, maximum, denominator, out, first_key, tokens, scale, KEYS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        scores = tl.where((first_key + tl.arange(0, KEYS) < tokens)[None, :], scores, float("-inf"))
    weights, decay, maximum, denominator = online_softmax(scores, maximum, denominator, scale)
    out = tl.dot(weights.to(v.dtype), v, out * decay[:, None])
    return maximum, denominator, out


def fits(width: int, head_dim: int, tokens: int) -> bool:
    """Whether a block of this shape should ask for LayerNorm, QKV and attention as one operator."""
    narrow = width <= _WIDEST and width % _STATISTICS_BLOCK.value == 0
    return narrow and head_dim in _HEAD_DIMS and tokens <= _MOST_TOKENS


def layer_norm_attention(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    scale: float,
) -> Tensor:
    tile = _tile(x, weight, weight.shape[0] // (3 * heads), heads)
    if tile is None:
        qkv = layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias)
        out, _ = attention(qkv.unflatten(-1, (3, heads, -1)), scale)
        return out
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return _launch(x, norm_weight, norm_bias, eps, weight.chunk(3), biases, heads, scale, tile)


def layer_norm_attention_qkv(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    heads: int,
    scale: float,
) -> Tensor:
    tile = _tile(x, q_weight, q_weight.shape[0] // heads, heads)
    if tile is None:
        projected = layer_norm_qkv(
            x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias
        )  # fmt: skip
        out, _ = attention_qkv(*(t.unflatten(-1, (heads, -1)) for t in projected), scale)
        return out
    biases = all_or_none((q_bias, k_bias, v_bias), q_weight)
    return _launch(x, norm_weight, norm_bias, eps, (q_weight, k_weight, v_weight), biases, heads, scale, tile)


def _tile(x: Tensor, weight: Tensor, head_dim: int, heads: int) -> launch.Tile | None:
    """The fused kernel's tile, or None where two launches do better."""
    batch, tokens, width = x.shape
    # float32 rows beside 16-bit weights, as under autocast, spill.
    if weight.element_size() != 2 or x.dtype is not weight.dtype:
        return None
    if not fits(width, head_dim, tokens) or not x.numel():
        return None
    if not launch.fills_device(batch * heads, x):
        return None
    return launch.layer_norm_attention(launch.architecture(x))


def _launch(x, norm_weight, norm_bias, eps, weights, biases, heads, scale, tile) -> Tensor:
    batch, tokens, width = x.shape
    x, weights = unit_stride(x), one_stride(weights)
    out = torch.empty((batch, tokens, weights[0].shape[0]), dtype=weights[0].dtype, device=x.device)
    launch.run(
        layer_norm_attention_kernel,
        batch * heads,
        x.device,
        x,
        *map(dense, (norm_weight, norm_bias)),
        *weights,
        *map(dense, biases),
        out,
        tokens,
        heads,
        scale,
        x.stride(0),
        x.stride(1),
        weights[0].stride(0),
        eps,
        WIDTH=width,
        HEAD_DIM=out.shape[-1] // heads,
        BLOCKS=tokens // tile.rows,
        BLOCK=tile.rows,
        TAIL=launch.tail_block(tokens, tile.rows),
        WIDTH_BLOCK=tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
