"""Gradients of flash attention, without atomics (Dao et al. 2022, appendix B; split over two kernels as in Dao 2023).

    P = exp(scale · q kᵀ − log_sum_exp),  delta = rowsum(dO ∘ O),  dS = P ∘ (dO vᵀ − delta)
    dv = Pᵀ dO,  dk = scale · dSᵀ q,  dq = scale · dS k

A program of the first kernel owns a block of queries and walks over the keys: dq, and delta for the second. A program
of the second owns a block of keys and walks over the queries: dk and dv. Every element has one owner that adds in one
order, so the bits are the same every run. The last owners have a tail as small as what is left; the walk masks every
block instead, since a second body behind the loop, for tiles of another shape, takes the registers of both.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.attention import settings
from deit_fast.kernels.attention.forward import separate
from deit_fast.kernels.launching import hardware, run, tiles
from deit_fast.kernels.launching.layout import unit_stride
from deit_fast.kernels.launching.metadata import attention_shape, described


@triton.jit(
    **described(
        "query_gradient_kernel", attention_shape, ("kept_ptr",), flops=lambda a: 6 * a["out_ptr"].numel() * a["keys"]
    )
)
def query_gradient_kernel(
    q_ptr,  # [B, queries, heads, d]
    k_ptr,  # [B, keys, heads, d]
    v_ptr,  # [B, keys, heads, d]
    out_ptr,  # [B, queries, heads, d]
    grad_ptr,  # [B, queries, heads, d]
    log_sum_exp_ptr,  # [B, heads, queries], float32
    delta_ptr,  # [B, heads, queries], float32
    dq_ptr,  # [B, queries, heads, d]
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
    grad_batch,
    grad_token,
    dq_batch,
    dq_token,
    dq_head,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    QUERY_TAIL: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dq = scale * dS k` and delta of one block of queries of one head, d = HEAD + TAIL wide; out and delta are dense.

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
    out_token = heads * (HEAD + TAIL)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    out_ptr += batch * queries * out_token + head * (HEAD + TAIL)
    grad_ptr += batch * grad_batch + head * (HEAD + TAIL)
    dq_ptr += batch * dq_batch + head * dq_head
    log_sum_exp_ptr += batch_head.to(tl.int64) * queries
    delta_ptr += batch_head.to(tl.int64) * queries

    if QUERY_TAIL == 0 or block < whole_blocks:
        _query_gradient(
            q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, log_sum_exp_ptr, delta_ptr, dq_ptr,
            block * QUERY_BLOCK, queries, keys, scale, q_token, k_token, v_token, out_token, grad_token, dq_token,
            HEAD, TAIL, QUERY_BLOCK, False, KEY_BLOCK, MASK_KEYS, PRECISION,
        )  # fmt: skip
    else:
        _query_gradient(
            q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, log_sum_exp_ptr, delta_ptr, dq_ptr,
            block * QUERY_BLOCK, queries, keys, scale, q_token, k_token, v_token, out_token, grad_token, dq_token,
            HEAD, TAIL, QUERY_TAIL, True, KEY_BLOCK, MASK_KEYS, PRECISION,
        )  # fmt: skip


@triton.jit
def _query_gradient(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, log_sum_exp_ptr, delta_ptr, dq_ptr,
    first_query, queries, keys, scale, q_token, k_token, v_token, out_token, grad_token, dq_token,
    HEAD: tl.constexpr, TAIL: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr,
    KEY_BLOCK: tl.constexpr, MASK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    query = first_query + tl.arange(0, QUERIES)
    q_head, q_tail = _load_head(q_ptr, query, q_token, queries, HEAD, TAIL, MASKED)
    grad_head, grad_tail = _load_head(grad_ptr, query, grad_token, queries, HEAD, TAIL, MASKED)
    out_head, out_tail = _load_head(out_ptr, query, out_token, queries, HEAD, TAIL, MASKED)
    delta = tl.sum(grad_head.to(tl.float32) * out_head.to(tl.float32), axis=1)
    if TAIL > 0:
        delta += tl.sum(grad_tail.to(tl.float32) * out_tail.to(tl.float32), axis=1)
    log_sum_exp = _load_vector(log_sum_exp_ptr, query, queries, MASKED)
    tl.store(delta_ptr + query, delta, mask=query < queries)

    dq_head = tl.zeros([QUERIES, HEAD], dtype=tl.float32)
    dq_tail = tl.zeros([QUERIES, TAIL if TAIL > 0 else 16], dtype=tl.float32)  # folded away where there is no tail
    for first_key in range(0, keys, KEY_BLOCK):
        dq_head, dq_tail = _add_keys(
            dq_head, dq_tail, q_head, q_tail, grad_head, grad_tail, log_sum_exp, delta, k_ptr, v_ptr,
            first_key, keys, scale, k_token, v_token, HEAD, TAIL, KEY_BLOCK, MASK_KEYS, PRECISION,
        )  # fmt: skip
    _store_head(dq_ptr, query, dq_token, queries, dq_head * scale, dq_tail * scale, HEAD, TAIL, MASKED)


@triton.jit
def _add_keys(
    dq_head, dq_tail, q_head, q_tail, grad_head, grad_tail, log_sum_exp, delta, k_ptr, v_ptr,
    first_key, keys, scale, k_token, v_token,
    HEAD: tl.constexpr, TAIL: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq with what one block of KEYS keys adds to it, the scale left out."""
    key = first_key + tl.arange(0, KEYS)
    k_head, k_tail = _load_head(k_ptr, key, k_token, keys, HEAD, TAIL, MASKED)
    v_head, v_tail = _load_head(v_ptr, key, v_token, keys, HEAD, TAIL, MASKED)
    scores = tl.dot(q_head, tl.trans(k_head), input_precision=PRECISION)
    of_weights = tl.dot(grad_head, tl.trans(v_head), input_precision=PRECISION)
    if TAIL > 0:
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
        of_weights = tl.dot(grad_tail, tl.trans(v_tail), of_weights, input_precision=PRECISION)
    of_scores = _weights(scores, log_sum_exp[:, None], scale) * (of_weights - delta[:, None])
    if MASKED:
        # After the weights: against an infinite delta a weight of 0 would not do.
        of_scores = tl.where((key < keys)[None, :], of_scores, 0.0)
    of_scores = of_scores.to(k_head.dtype)
    dq_head = tl.dot(of_scores, k_head, dq_head, input_precision=PRECISION)
    if TAIL > 0:
        dq_tail = tl.dot(of_scores, k_tail, dq_tail, input_precision=PRECISION)
    return dq_head, dq_tail


@triton.jit(
    **described(
        "key_gradient_kernel", attention_shape, ("kept_ptr",), flops=lambda a: 8 * a["grad_ptr"].numel() * a["keys"]
    )
)
def key_gradient_kernel(
    q_ptr,  # [B, queries, heads, d]
    k_ptr,  # [B, keys, heads, d]
    v_ptr,  # [B, keys, heads, d]
    grad_ptr,  # [B, queries, heads, d]
    log_sum_exp_ptr,  # [B, heads, queries], float32
    delta_ptr,  # [B, heads, queries], float32
    dk_ptr,  # [B, keys, heads, d]
    dv_ptr,  # [B, keys, heads, d]
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
    grad_batch,
    grad_token,
    dk_batch,
    dk_token,
    dk_head,
    dv_batch,
    dv_token,
    dv_head,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    MASK_QUERIES: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dk = scale * dSᵀ q` and `dv = Pᵀ dO` of one block of keys of one head, d = HEAD + TAIL wide.

    With `kept_ptr`, only of the first kept[0] samples.
    """
    whole_blocks = keys // KEY_BLOCK
    blocks = whole_blocks
    if KEY_TAIL > 0:
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
    grad_ptr += batch * grad_batch + head * (HEAD + TAIL)
    dk_ptr += batch * dk_batch + head * dk_head
    dv_ptr += batch * dv_batch + head * dv_head
    log_sum_exp_ptr += batch_head.to(tl.int64) * queries
    delta_ptr += batch_head.to(tl.int64) * queries

    if KEY_TAIL == 0 or block < whole_blocks:
        _key_gradient(
            q_ptr, k_ptr, v_ptr, grad_ptr, log_sum_exp_ptr, delta_ptr, dk_ptr, dv_ptr,
            block * KEY_BLOCK, queries, keys, scale, q_token, k_token, v_token, grad_token, dk_token, dv_token,
            HEAD, TAIL, KEY_BLOCK, False, QUERY_BLOCK, MASK_QUERIES, PRECISION,
        )  # fmt: skip
    else:
        _key_gradient(
            q_ptr, k_ptr, v_ptr, grad_ptr, log_sum_exp_ptr, delta_ptr, dk_ptr, dv_ptr,
            block * KEY_BLOCK, queries, keys, scale, q_token, k_token, v_token, grad_token, dk_token, dv_token,
            HEAD, TAIL, KEY_TAIL, True, QUERY_BLOCK, MASK_QUERIES, PRECISION,
        )  # fmt: skip


@triton.jit
def _key_gradient(
    q_ptr, k_ptr, v_ptr, grad_ptr, log_sum_exp_ptr, delta_ptr, dk_ptr, dv_ptr,
    first_key, queries, keys, scale, q_token, k_token, v_token, grad_token, dk_token, dv_token,
    HEAD: tl.constexpr, TAIL: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, MASK_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key = first_key + tl.arange(0, KEYS)
    k_head, k_tail = _load_head(k_ptr, key, k_token, keys, HEAD, TAIL, MASKED)
    v_head, v_tail = _load_head(v_ptr, key, v_token, keys, HEAD, TAIL, MASKED)
    dk_head = tl.zeros([KEYS, HEAD], dtype=tl.float32)
    dv_head = tl.zeros([KEYS, HEAD], dtype=tl.float32)
    dk_tail = tl.zeros([KEYS, TAIL if TAIL > 0 else 16], dtype=tl.float32)  # folded away where there is no tail
    dv_tail = tl.zeros([KEYS, TAIL if TAIL > 0 else 16], dtype=tl.float32)
    for first_query in range(0, queries, QUERY_BLOCK):
        dk_head, dk_tail, dv_head, dv_tail = _add_queries(
            dk_head, dk_tail, dv_head, dv_tail, k_head, k_tail, v_head, v_tail, q_ptr, grad_ptr, log_sum_exp_ptr,
            delta_ptr, first_query, queries, scale, q_token, grad_token,
            HEAD, TAIL, QUERY_BLOCK, MASK_QUERIES, PRECISION,
        )  # fmt: skip
    _store_head(dk_ptr, key, dk_token, keys, dk_head * scale, dk_tail * scale, HEAD, TAIL, MASKED)
    _store_head(dv_ptr, key, dv_token, keys, dv_head, dv_tail, HEAD, TAIL, MASKED)


@triton.jit
def _add_queries(
    dk_head, dk_tail, dv_head, dv_tail, k_head, k_tail, v_head, v_tail, q_ptr, grad_ptr, log_sum_exp_ptr,
    delta_ptr, first_query, queries, scale, q_token, grad_token,
    HEAD: tl.constexpr, TAIL: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, the scale left out, and dv with what one block of QUERIES queries adds. Scores lie [KEYS, QUERIES]."""
    query = first_query + tl.arange(0, QUERIES)
    q_head, q_tail = _load_head(q_ptr, query, q_token, queries, HEAD, TAIL, MASKED)
    grad_head, grad_tail = _load_head(grad_ptr, query, grad_token, queries, HEAD, TAIL, MASKED)
    scores = tl.dot(k_head, tl.trans(q_head), input_precision=PRECISION)
    if TAIL > 0:
        scores = tl.dot(k_tail, tl.trans(q_tail), scores, input_precision=PRECISION)
    if MASKED:
        # Of a query that isn't there every weight is 0, whatever the key.
        scores = tl.where((query < queries)[None, :], scores, float("-inf"))
    weights = _weights(scores, _load_vector(log_sum_exp_ptr, query, queries, MASKED)[None, :], scale)
    dv_head = tl.dot(weights.to(grad_head.dtype), grad_head, dv_head, input_precision=PRECISION)
    if TAIL > 0:
        dv_tail = tl.dot(weights.to(grad_tail.dtype), grad_tail, dv_tail, input_precision=PRECISION)
    of_weights = tl.dot(v_head, tl.trans(grad_head), input_precision=PRECISION)
    if TAIL > 0:
        of_weights = tl.dot(v_tail, tl.trans(grad_tail), of_weights, input_precision=PRECISION)
    of_scores = weights * (of_weights - _load_vector(delta_ptr, query, queries, MASKED)[None, :])
    of_scores = of_scores.to(q_head.dtype)
    dk_head = tl.dot(of_scores, q_head, dk_head, input_precision=PRECISION)
    if TAIL > 0:
        dk_tail = tl.dot(of_scores, q_tail, dk_tail, input_precision=PRECISION)
    return dk_head, dk_tail, dv_head, dv_tail


@triton.jit
def _weights(scores, log_sum_exp, scale):
    """The softmax, recomputed; by exp2, which the hardware has."""
    return tl.exp2((scores * scale - log_sum_exp) * 1.4426950408889634)


@triton.jit
def _load_head(ptr, rows, token, length, HEAD: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a head in two tiles, zeros past `length`; no `tail` where TAIL is 0."""
    head = ptr + (rows.to(tl.int64) * token)[:, None] + tl.arange(0, HEAD)[None, :]
    mask = (rows < length)[:, None] if MASKED else None
    other = 0.0 if MASKED else None
    head_tile = tl.load(head, mask=mask, other=other)
    tail_tile = head_tile
    if TAIL > 0:
        tail = ptr + (rows.to(tl.int64) * token)[:, None] + HEAD + tl.arange(0, TAIL)[None, :]
        tail_tile = tl.load(tail, mask=mask, other=other)
    return head_tile, tail_tile


@triton.jit
def _load_vector(ptr, rows, length, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptr + rows, mask=rows < length, other=0.0)
    else:
        return tl.load(ptr + rows)


@triton.jit
def _store_head(
    ptr, rows, token, length, head_tile, tail_tile, HEAD: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr
):
    head = ptr + (rows.to(tl.int64) * token)[:, None] + tl.arange(0, HEAD)[None, :]
    mask = (rows < length)[:, None] if MASKED else None
    tl.store(head, head_tile.to(ptr.dtype.element_ty), mask=mask)
    if TAIL > 0:
        tail = ptr + (rows.to(tl.int64) * token)[:, None] + HEAD + tl.arange(0, TAIL)[None, :]
        tl.store(tail, tail_tile.to(ptr.dtype.element_ty), mask=mask)


def attention_backward(
    grad: Tensor,
    qkv: Sequence[Tensor],
    out: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    kept: Tensor | None,
) -> list[Tensor]:
    """Gradients of `attention(qkv, scale)`: one packed [B, N, 3, H, d], or three, as qkv is.

    grad, out: [B, N, H·d]; log_sum_exp: [B, H, N], float32, natural logarithm. Any strides. With `kept` (see
    `drop_path.keep_samples`) all of them hold kept samples, packed.
    """
    found = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in qkv]
    q, k, v = separate(qkv)
    dq, dk, dv = separate(found)
    _launch(grad, q, k, v, out, log_sum_exp, scale, dq, dk, dv, kept)
    return found


def _launch(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    kept: Tensor | None,
) -> None:
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    q, k, v, grad_out = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(grad_out)
    out, log_sum_exp = out.contiguous(), log_sum_exp.contiguous()
    delta = torch.empty_like(log_sum_exp)
    arch = hardware.architecture(q)
    head, tail = tiles.cover(head_dim)
    query_tile, key_tile = settings.attention_backward(head_dim, q.element_size(), arch)
    shape = (queries, keys, heads, scale, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:2])

    def options(tile: settings.AttentionTile) -> dict:
        return {
            "HEAD": head,
            "TAIL": tail,
            "QUERY_BLOCK": tile.queries,
            "KEY_BLOCK": tile.keys,
            "PRECISION": hardware.dot_precision(q.dtype, arch),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    run.run(
        query_gradient_kernel,
        batch * heads * triton.cdiv(queries, query_tile.queries),
        q.device,
        *(q, k, v, out, grad_out, log_sum_exp, delta, dq, kept),
        *shape,
        *dq.stride()[:3],
        QUERY_TAIL=tiles.tail_block(queries, query_tile.queries),
        MASK_KEYS=keys % query_tile.keys != 0,
        **options(query_tile),
    )
    run.run(
        key_gradient_kernel,
        batch * heads * triton.cdiv(keys, key_tile.keys),
        q.device,
        *(q, k, v, grad_out, log_sum_exp, delta, dk, dv, kept),
        *shape,
        *dk.stride()[:3],
        *dv.stride()[:3],
        KEY_TAIL=tiles.tail_block(keys, key_tile.keys),
        MASK_QUERIES=queries % key_tile.queries != 0,
        **options(key_tile),
    )
