"""Flash attention (Dao et al. 2022) over all tokens, with tiles that end where the tokens do.

198 tokens are three blocks of 64 and a tail of 6: whole blocks run without masks, the tail in a tile of 16,
for queries and for keys.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.attention import settings
from deit_fast.kernels.launching import hardware, run, tiles
from deit_fast.kernels.launching.layout import unit_stride
from deit_fast.kernels.launching.metadata import attention_shape, described

HEAD_DIMS = (32, 64, 80, 96, 128)
# Of heads whose products are split into what TF32 multiplies: wider ones spill registers.
_WIDEST_FLOAT32 = 64


@triton.jit(
    **described(
        "attention_kernel", attention_shape, ("kept_ptr",), flops=lambda a: 4 * a["out_ptr"].numel() * a["keys"]
    )
)
def attention_kernel(
    q_ptr,  # [B, queries, heads, HEAD_DIM]
    k_ptr,  # [B, keys, heads, HEAD_DIM]
    v_ptr,  # [B, keys, heads, HEAD_DIM]
    out_ptr,  # [B, queries, heads, HEAD_DIM]
    log_sum_exp_ptr,  # [B, heads, queries], float32
    kept_ptr,  # [1 + B] or None
    queries,
    keys,
    heads,
    scale,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    QUERY_TAIL: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out = softmax(scale * q kᵀ) v`, and the log-sum-exp of the scaled scores' rows.

    Dao et al. 2022, algorithm 1, with the loop over the queries outside (Dao 2023). One program attends from one block
    of queries of one head. HEAD + TAIL are the head's width in two tiles.

    With `kept_ptr`, only of the first kept[0] samples.
    """
    whole_blocks = queries // QUERY_BLOCK
    blocks = whole_blocks
    if QUERY_TAIL > 0:
        blocks += 1
    block = tl.program_id(0) % blocks
    batch_head = tl.program_id(0) // blocks
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    if kept_ptr is not None and batch >= tl.load(kept_ptr):
        return
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    out_token = heads * HEAD_DIM
    out_ptr += batch * queries * out_token + head * HEAD_DIM
    log_sum_exp_ptr += batch_head.to(tl.int64) * queries

    if QUERY_TAIL == 0 or block < whole_blocks:
        _attend(
            q_ptr, k_ptr, v_ptr, out_ptr, log_sum_exp_ptr, block * QUERY_BLOCK, queries, keys, scale,
            q_token, k_token, v_token, out_token, HEAD_DIM, HEAD, TAIL, QUERY_BLOCK, KEY_BLOCK, KEY_TAIL, PRECISION,
        )  # fmt: skip
    else:
        _attend(
            q_ptr, k_ptr, v_ptr, out_ptr, log_sum_exp_ptr, block * QUERY_BLOCK, queries, keys, scale,
            q_token, k_token, v_token, out_token, HEAD_DIM, HEAD, TAIL, QUERY_TAIL, KEY_BLOCK, KEY_TAIL, PRECISION,
        )  # fmt: skip


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, out_ptr, log_sum_exp_ptr, first_query, queries, keys, scale,
    q_token, k_token, v_token, out_token,
    HEAD_DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, KEY_BLOCK: tl.constexpr, KEY_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS queries from `first_query` on over all keys, by online softmax (Milakov & Gimelshein 2018)."""
    row = first_query + tl.arange(0, ROWS)
    row_mask = row < queries
    row_offset = row.to(tl.int64)
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    q_head = tl.load(q_ptr + (row_offset * q_token)[:, None] + head[None, :], mask=row_mask[:, None], other=0.0)
    out_head = tl.zeros([ROWS, HEAD], dtype=tl.float32)
    q_tail = q_head
    out_tail = tl.zeros([ROWS, 16], dtype=tl.float32)  # folded away where there is no tail
    if TAIL > 0:
        mask = row_mask[:, None] & (tail < HEAD_DIM)[None, :]
        q_tail = tl.load(q_ptr + (row_offset * q_token)[:, None] + tail[None, :], mask=mask, other=0.0)
        out_tail = tl.zeros([ROWS, TAIL], dtype=tl.float32)
    maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    denominator = tl.zeros([ROWS], dtype=tl.float32)

    whole_keys = keys // KEY_BLOCK * KEY_BLOCK
    for first_key in range(0, whole_keys, KEY_BLOCK):
        maximum, denominator, out_head, out_tail = _attend_keys(
            q_head, q_tail, k_ptr, v_ptr, first_key, keys, scale, k_token, v_token,
            maximum, denominator, out_head, out_tail, HEAD_DIM, HEAD, TAIL, KEY_BLOCK, False, PRECISION,
        )  # fmt: skip
    if KEY_TAIL > 0:
        maximum, denominator, out_head, out_tail = _attend_keys(
            q_head, q_tail, k_ptr, v_ptr, whole_keys, keys, scale, k_token, v_token,
            maximum, denominator, out_head, out_tail, HEAD_DIM, HEAD, TAIL, KEY_TAIL, True, PRECISION,
        )  # fmt: skip

    out_rows = out_ptr + (row_offset * out_token)[:, None]
    out = (out_head / denominator[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_rows + head[None, :], out, mask=row_mask[:, None])
    if TAIL > 0:
        out = (out_tail / denominator[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_rows + tail[None, :], out, mask=row_mask[:, None] & (tail < HEAD_DIM)[None, :])
    log_sum_exp = maximum * scale + tl.log(denominator)
    tl.store(log_sum_exp_ptr + row, log_sum_exp, mask=row_mask)


@triton.jit
def _attend_keys(
    q_head, q_tail, k_ptr, v_ptr, first_key, keys, scale, k_token, v_token,
    maximum, denominator, out_head, out_tail,
    HEAD_DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of KEYS keys folded into the running maximum, denominator and output."""
    key = first_key + tl.arange(0, KEYS)
    key_offset = key.to(tl.int64)
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    if MASKED:
        key_mask = key < keys
        k_head = tl.load(k_ptr + (key_offset * k_token)[None, :] + head[:, None], mask=key_mask[None, :], other=0.0)
        v_head = tl.load(v_ptr + (key_offset * v_token)[:, None] + head[None, :], mask=key_mask[:, None], other=0.0)
    else:
        k_head = tl.load(k_ptr + (key_offset * k_token)[None, :] + head[:, None])
        v_head = tl.load(v_ptr + (key_offset * v_token)[:, None] + head[None, :])
    scores = tl.dot(q_head, k_head, input_precision=PRECISION)
    if TAIL > 0:
        k_tail = tl.load(
            k_ptr + (key_offset * k_token)[None, :] + tail[:, None],
            mask=(key < keys)[None, :] & (tail < HEAD_DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(q_tail, k_tail, scores, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(key_mask[None, :], scores, float("-inf"))

    weights, decay, maximum, denominator = _online_softmax(scores, maximum, denominator, scale)
    weights = weights.to(v_head.dtype)
    out_head = tl.dot(weights, v_head, out_head * decay[:, None], input_precision=PRECISION)
    if TAIL > 0:
        v_tail = tl.load(
            v_ptr + (key_offset * v_token)[:, None] + tail[None, :],
            mask=(key < keys)[:, None] & (tail < HEAD_DIM)[None, :],
            other=0.0,
        )
        out_tail = tl.dot(weights, v_tail, out_tail * decay[:, None], input_precision=PRECISION)
    return maximum, denominator, out_head, out_tail


@triton.jit
def _online_softmax(scores, maximum, denominator, scale):
    """A tile of scores folded into the rows' running maximum and denominator (Milakov & Gimelshein 2018).

    Returns the tile's weights, by what factor earlier sums decay, and the new maximum and denominator.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    # A row that has seen only -inf keeps 0 as its reference, or -inf - -inf would make it NaN too early.
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    # The scale enters here, in the exponent's multiply-add; with log2(e), since the hardware has exp2.
    scale_log2 = scale * 1.4426950408889634
    weights = tl.exp2(scores * scale_log2 - (reference * scale_log2)[:, None])
    decay = tl.exp2((maximum - reference) * scale_log2)
    return weights, decay, new_maximum, denominator * decay + tl.sum(weights, axis=1)


def unsupported(head_dim: int, scale: float, multiplied: Tensor) -> str | None:
    """multiplied: a tensor of the products' dtype, on their device."""
    if scale <= 0:
        return "no kernel for a scale that is not positive"
    if head_dim not in HEAD_DIMS:
        return f"no kernel for heads of width {head_dim} (there are {', '.join(map(str, HEAD_DIMS))})"
    if head_dim > _WIDEST_FLOAT32 and multiplied.dtype is torch.float32 and hardware.splits_float32(multiplied):
        return f"float32 heads of width {head_dim} do not fit in registers (at most {_WIDEST_FLOAT32})"
    return None


def separate(qkv: Sequence[Tensor]) -> Sequence[Tensor]:
    """q, k and v, each [B, N, H, d], of one packed [B, N, 3, H, d] or of three."""
    return qkv[0].unbind(2) if len(qkv) == 1 else qkv


def attention(qkv: Sequence[Tensor], scale: float, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The output [B, N, H·d], and the log-sum-exp of the scaled scores [B, H, N], float32.

    qkv: one packed [B, N, 3, H, d], or q [B, N, H, d] and k and v [B, M, H, d]; any strides. With `kept` (see
    `drop_path.keep_samples`) they are packed samples, and so are both results.
    """
    q, k, v = separate(qkv)
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    out = torch.empty((batch, queries, heads * head_dim), dtype=q.dtype, device=q.device)
    log_sum_exp = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, log_sum_exp
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    arch = hardware.architecture(q)
    tile = settings.attention(head_dim, q.element_size(), arch)
    head, tail = tiles.cover(head_dim)
    run.run(
        attention_kernel,
        batch * heads * triton.cdiv(queries, tile.queries),
        q.device,
        q,
        k,
        v,
        out,
        log_sum_exp,
        kept,
        queries,
        keys,
        heads,
        scale,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        HEAD_DIM=head_dim,
        HEAD=head,
        TAIL=tail,
        QUERY_BLOCK=tile.queries,
        QUERY_TAIL=tiles.tail_block(queries, tile.queries),
        KEY_BLOCK=tile.keys,
        KEY_TAIL=tiles.tail_block(keys, tile.keys),
        PRECISION=hardware.dot_precision(q.dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, log_sum_exp
