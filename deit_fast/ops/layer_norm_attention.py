"""LayerNorm, QKV and attention as one operator: what inference needs of them is the output alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import attention as attention_kernels
from deit_fast.kernels import launch
from deit_fast.kernels import layer_norm_attention as kernels
from deit_fast.ops import checks
from deit_fast.ops.attention_backward import attention_backward, attention_qkv_backward
from deit_fast.ops.layer_norm import stock_layer_norm
from deit_fast.ops.linear import (
    autocast_layer_norm_linear,
    autocast_layer_norm_qkv,
    check_packed_qkv,
    check_qkv,
    qkv_gradients,
    qkv_needs,
    stock_layer_norm_qkv,
    stock_linear,
)
from deit_fast.ops.linear_backward import layer_norm_linear_backward
from deit_fast.ops.registration import distribute, register


def _by_head(projected: Tensor, heads: int) -> Tensor:
    batch, tokens, width = projected.shape
    return projected.view(batch, tokens, heads, width // heads)


def _packed_by_head(qkv: Tensor, heads: int) -> Tensor:
    batch, tokens, width = qkv.shape
    return qkv.view(batch, tokens, 3, heads, width // (3 * heads))


def _stock(x, norm_weight, norm_bias, eps, weight, bias, heads, scale):
    qkv = stock_linear(stock_layer_norm(x, norm_weight, norm_bias, eps), weight, bias)
    return _attend(*_packed_by_head(qkv, heads).unbind(2), scale)


def _stock_qkv(x, norm_weight, norm_bias, eps, *rest):
    *projections, heads, scale = rest
    projected = stock_layer_norm_qkv(x, norm_weight, norm_bias, eps, *projections)
    return _attend(*(_by_head(t, heads) for t in projected), scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`attention_qkv` in stock PyTorch, without the log-sum-exp."""
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale)
    return out.transpose(1, 2).flatten(2)


def _check_heads(op: str, x: Tensor, width: int, heads: int) -> None:
    checks.token_sequence(op, "the input", x)
    checks.heads_divide(op, width, heads)


def _check(x, norm_weight, norm_bias, eps, weight, bias, heads, scale):
    op = "layer_norm_attention"
    check_packed_qkv(op, x, norm_weight, norm_bias, weight, bias)
    _check_heads(op, x, weight.shape[0] // 3, heads)


def _check_qkv(x, norm_weight, norm_bias, eps, *rest):
    op = "layer_norm_attention_qkv"
    *projections, heads, _ = rest
    check_qkv(op, x, norm_weight, norm_bias, projections)
    _check_heads(op, x, projections[0].shape[0], heads)


def _unsupported(x, norm_weight, norm_bias, eps, *rest):
    *projections, heads, scale = rest
    width = projections[0].shape[0] // (3 if len(projections) == 2 else 1)
    return (
        (launch.no_separate_projections(projections[0]) if len(projections) > 2 else None)
        or attention_kernels.unsupported(width // heads, scale, projections[0])
        or checks.kernel_products(*projections, x, norm_weight, norm_bias)
    )


def _save(ctx, args, out):
    x, norm_weight, norm_bias, eps, *projections, heads, scale = args
    ctx.save_for_backward(x, norm_weight, norm_bias, *projections)
    ctx.eps, ctx.heads, ctx.scale = eps, heads, scale


def _backward(ctx, grad):
    """Nothing between was kept: it is computed once more, then the two halves' backwards run as ever."""
    x, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
    qkv = torch.ops.deit_fast.layer_norm_linear(x, norm_weight, norm_bias, ctx.eps, weight, bias, None, None)
    by_head = _packed_by_head(qkv, ctx.heads)
    out, log_sum_exp = torch.ops.deit_fast.attention(by_head, ctx.scale, None)
    of_qkv = attention_backward(grad, by_head, out, log_sum_exp, ctx.scale, None).flatten(2)
    wanted = ctx.needs_input_grad
    needs = [*wanted[:3], *wanted[4:6]]
    found = layer_norm_linear_backward(
        x, norm_weight, norm_bias, ctx.eps, [of_qkv], [weight], [bias], None, None, needs
    )
    dx, dnorm_weight, dnorm_bias, dweight, dbias = distribute(found, needs)
    return dx, dnorm_weight, dnorm_bias, None, dweight, dbias, None, None


def _backward_qkv(ctx, grad):
    x, norm_weight, norm_bias, *projections = ctx.saved_tensors
    projected = torch.ops.deit_fast.layer_norm_qkv(x, norm_weight, norm_bias, ctx.eps, *projections)
    by_head = [_by_head(t, ctx.heads) for t in projected]
    out, log_sum_exp = torch.ops.deit_fast.attention_qkv(*by_head, ctx.scale)
    of_projected = attention_qkv_backward(grad, *by_head, out, log_sum_exp, ctx.scale)
    weights, biases = projections[::2], projections[1::2]
    needs = qkv_needs(ctx)
    found = layer_norm_linear_backward(
        x, norm_weight, norm_bias, ctx.eps, [t.flatten(2) for t in of_projected], weights, biases, None, None, needs
    )
    return *qkv_gradients(distribute(found, needs)), None, None


_layer_norm_attention = register(
    "layer_norm_attention",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor? bias, int num_heads, "
    "float scale) -> Tensor",
    check=_check,
    stock=_stock,
    triton=kernels.layer_norm_attention,
    unsupported=_unsupported,
    fake=lambda x, norm_weight, norm_bias, eps, weight, *_: x.new_empty(
        (*x.shape[:-1], weight.shape[0] // 3), dtype=weight.dtype
    ),
    autocast=autocast_layer_norm_linear,
    save=_save,
    backward=_backward,
    own_backward=True,
)

_layer_norm_attention_qkv = register(
    "layer_norm_attention_qkv",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor q_weight, Tensor? q_bias, "
    "Tensor k_weight, Tensor? k_bias, Tensor v_weight, Tensor? v_bias, int num_heads, float scale) -> Tensor",
    check=_check_qkv,
    stock=_stock_qkv,
    triton=kernels.layer_norm_attention_qkv,
    unsupported=_unsupported,
    fake=lambda x, norm_weight, norm_bias, eps, q_weight, *_: x.new_empty(
        (*x.shape[:-1], q_weight.shape[0]), dtype=q_weight.dtype
    ),
    autocast=autocast_layer_norm_qkv,
    save=_save,
    backward=_backward_qkv,
    own_backward=True,
)


def layer_norm_attention(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Attention(LayerNorm(x)) before the output projection; q, k and v never leave the operator.

    x [B, N, D], norm_weight and norm_bias [D], weight [3W, D] and bias [3W]: those of q, k and v one below the other
    → [B, N, W] in the weight's dtype. One kernel where the keys and values of a head stay on chip
    (`kernels.layer_norm_attention`), else two launches. Backward computes q, k and v once more.
    """
    if x.dtype is not weight.dtype:
        checks.same_dtype("layer_norm_attention", x, weight)
    return _layer_norm_attention(x, norm_weight, norm_bias, eps, weight, bias, num_heads, scale)


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
    num_heads: int,
    scale: float,
) -> Tensor:
    """As `layer_norm_attention`, from three projections kept as separate parameters: weights [W, D], biases [W]."""
    if x.dtype is not q_weight.dtype:
        checks.same_dtype("layer_norm_attention_qkv", x, q_weight)
    return _layer_norm_attention_qkv(
        x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, num_heads, scale
    )
