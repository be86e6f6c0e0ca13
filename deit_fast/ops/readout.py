"""Attention for the few rows that a classifier reads, without the keys and values of the others.

The algebra is in `reference/readout.py`: keys' and values' weights go to the queries and to what the softmax summed,
so that one pass over x is left.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from deit_fast.kernels import linear as linear_kernels
from deit_fast.kernels import readout as kernels
from deit_fast.ops import checks
from deit_fast.ops.layer_norm import stock_layer_norm
from deit_fast.ops.linear import (
    autocast_layer_norm_linear,
    autocast_layer_norm_qkv,
    check_packed_qkv,
    check_qkv,
    qkv_gradients,
    qkv_needs,
    stock_linear,
)
from deit_fast.ops.product_dtype import as_dtype
from deit_fast.ops.readout_backward import affine, readout_attention_backward, stock_normalised, to_heads
from deit_fast.ops.registration import distribute, register


def _stock_readout(x, absorbed, norm_weight, eps, _):
    normalised, _, _ = stock_normalised(x, eps)
    queries = affine(absorbed.to(normalised.dtype), norm_weight, None).flatten(1, 2)
    scores = queries @ normalised.mT
    log_sum_exp = scores.logsumexp(-1)
    summed = scores.softmax(-1) @ normalised
    return summed.view(absorbed.shape), log_sum_exp.view(absorbed.shape[:-1])


def _stock_layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias):
    return stock_linear(stock_layer_norm(x, norm_weight, norm_bias, eps), weight, bias)


def _implementation(layer_norm_linear: Callable, readout: Callable) -> Callable:
    """The operator around the two parts that have kernels; the small products are torch's in either path."""

    def attend(
        x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, rows, heads, scale
    ):
        dtype = q_weight.dtype
        residual = x[:, :rows]
        q = layer_norm_linear(residual, norm_weight, norm_bias, eps, q_weight, q_bias)
        by_head = (heads, -1, x.shape[-1])
        absorbed = to_heads(q, k_weight.view(by_head), scale)
        summed, log_sum_exp = readout(x, absorbed, norm_weight, eps, dtype)
        weighted = as_dtype(affine(summed, norm_weight, norm_bias), dtype)
        out = to_heads(weighted.flatten(2), v_weight.view(by_head).mT).flatten(2)
        if v_bias is not None:
            out = out + as_dtype(v_bias, dtype)
        return out, residual.clone(memory_format=torch.contiguous_format), q, absorbed, summed, log_sum_exp

    return attend


_stock = _implementation(_stock_layer_norm_linear, _stock_readout)
_triton = _implementation(linear_kernels.layer_norm_linear, kernels.readout)


def _packed(attend: Callable) -> Callable:
    def implementation(x, norm_weight, norm_bias, eps, weight, bias, rows, heads, scale):
        (q, k, v), (q_bias, k_bias, v_bias) = _split(weight, bias)
        return attend(x, norm_weight, norm_bias, eps, q, q_bias, k, k_bias, v, v_bias, rows, heads, scale)

    return implementation


def _split(weight: Tensor, bias: Tensor | None) -> tuple[tuple, tuple]:
    return weight.chunk(3), (None,) * 3 if bias is None else bias.chunk(3)


def _check_rows(op: str, x: Tensor, rows: int, heads: int, width: int) -> None:
    checks.token_sequence(op, "the input", x)
    if not 1 <= rows <= x.shape[1]:
        raise ValueError(f"deit_fast.{op}: readout_rows must be from 1 to the {x.shape[1]} tokens, got {rows}")
    checks.heads_divide(op, width, heads)


def _check(x, norm_weight, norm_bias, eps, weight, bias, rows, heads, scale):
    op = "readout_attention"
    check_packed_qkv(op, x, norm_weight, norm_bias, weight, bias)
    _check_rows(op, x, rows, heads, weight.shape[0] // 3)


def _check_qkv(x, norm_weight, norm_bias, eps, *rest):
    op = "readout_attention_qkv"
    *projections, rows, heads, _ = rest
    check_qkv(op, x, norm_weight, norm_bias, projections)
    _check_rows(op, x, rows, heads, projections[0].shape[0])


def _unsupported(x, norm_weight, norm_bias, eps, *rest):
    return kernels.forward_unsupported(x, rest[0].dtype) or checks.kernel_products(
        *rest[:-3], x, norm_weight, norm_bias
    )


def _fake(x, weight, width, rows, heads):
    batch, _, depth = x.shape
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (
        x.new_empty((batch, rows, width), dtype=weight.dtype),
        x.new_empty((batch, rows, depth)),
        x.new_empty((batch, rows, width), dtype=weight.dtype),
        x.new_empty((batch, rows, heads, depth), dtype=weight.dtype),
        x.new_empty((batch, rows, heads, depth), dtype=wide),
        x.new_empty((batch, rows, heads), dtype=wide),
    )


def _save(ctx, args, outputs):
    x, norm_weight, norm_bias, eps, *projections, _, heads, scale = args
    _, _, *rest = outputs
    ctx.save_for_backward(x, norm_weight, norm_bias, *rest, *projections)
    ctx.mark_non_differentiable(*rest)
    ctx.eps, ctx.heads, ctx.scale = eps, heads, scale


def _differentiate(ctx, grad, residual_grad, saved, weights, biases, needs):
    x, norm_weight, norm_bias, q, absorbed, summed, log_sum_exp = saved
    if grad is None:
        grad = torch.zeros_like(q)
    found = readout_attention_backward(
        grad, residual_grad, x, norm_weight, norm_bias, ctx.eps, weights, biases, q, absorbed, summed, log_sum_exp,
        ctx.heads, ctx.scale, needs,
    )  # fmt: skip
    return distribute(found, needs)


def _backward(ctx, grad, residual_grad, *_):
    # Asked for once: a checkpoint gives them no second time.
    *saved, weight, bias = ctx.saved_tensors
    weights, biases = _split(weight, bias)
    wanted = ctx.needs_input_grad
    needs = [*wanted[:3], *[wanted[4]] * 3, *[wanted[5]] * 3]
    dx, dnorm_weight, dnorm_bias, *rest = _differentiate(ctx, grad, residual_grad, saved, weights, biases, needs)
    dweight, dbias = (torch.cat(part) if part[0] is not None else None for part in (rest[:3], rest[3:]))
    return dx, dnorm_weight, dnorm_bias, None, dweight, dbias, None, None, None


def _backward_qkv(ctx, grad, residual_grad, *_):
    saved = ctx.saved_tensors
    saved, projections = saved[:7], saved[7:]
    found = _differentiate(ctx, grad, residual_grad, saved, projections[::2], projections[1::2], qkv_needs(ctx))
    return *qkv_gradients(found), None, None, None


_OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

_readout_attention = register(
    "readout_attention",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor? bias, int readout_rows, "
    f"int num_heads, float scale) -> {_OUTPUTS}",
    check=_check,
    stock=_packed(_stock),
    triton=_packed(_triton),
    unsupported=_unsupported,
    fake=lambda x, norm_weight, norm_bias, eps, weight, bias, rows, heads, scale: _fake(
        x, weight, weight.shape[0] // 3, rows, heads
    ),
    autocast=autocast_layer_norm_linear,
    save=_save,
    backward=_backward,
    own_backward=True,
)

_readout_attention_qkv = register(
    "readout_attention_qkv",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor q_weight, Tensor? q_bias, "
    "Tensor k_weight, Tensor? k_bias, Tensor v_weight, Tensor? v_bias, int readout_rows, int num_heads, "
    f"float scale) -> {_OUTPUTS}",
    check=_check_qkv,
    stock=_stock,
    triton=_triton,
    unsupported=_unsupported,
    fake=lambda x, norm_weight, norm_bias, eps, q_weight, *rest: _fake(
        x, q_weight, q_weight.shape[0], rest[-3], rest[-2]
    ),
    autocast=autocast_layer_norm_qkv,
    save=_save,
    backward=_backward_qkv,
    own_backward=True,
)


def readout_attention(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    readout_rows: int,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention(LayerNorm(x)) of the first R = `readout_rows` rows, before the projection, and those rows of x.

    x [B, N, D], norm_weight and norm_bias [D], weight [3W, D] and bias [3W]: those of q, k and v one below the other
    → [B, R, W] in the weight's dtype, and x's rows [B, R, D], whose gradient joins x's in the same backward.
    """
    if x.dtype is not weight.dtype:
        checks.same_dtype("readout_attention", x, weight)
    outputs = _readout_attention(x, norm_weight, norm_bias, eps, weight, bias, readout_rows, num_heads, scale)
    return outputs[0], outputs[1]


def readout_attention_qkv(
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
    readout_rows: int,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `readout_attention`, from three projections kept as separate parameters; k_bias has the gradient 0."""
    if x.dtype is not q_weight.dtype:
        checks.same_dtype("readout_attention_qkv", x, q_weight)
    outputs = _readout_attention_qkv(
        x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias,
        readout_rows, num_heads, scale,
    )  # fmt: skip
    return outputs[0], outputs[1]
