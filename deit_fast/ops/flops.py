"""How many floating-point operations each operator computes, for `torch.utils.flop_counter.FlopCounterMode`.

As torch counts them: two for each multiply-add of a matrix product, nothing else, and a backward's recomputation
counts. Samples that drop path dropped are not computed and not counted: the counter reads how many were kept, which
stops a GPU, and only while it counts.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from deit_fast.ops.backend import use_triton

_OPS = torch.ops.deit_fast


def _samples(x: Tensor, kept: Tensor | None) -> int:
    """For how many samples an operator computes; all of them where the tensors hold no values."""
    if kept is None:
        return x.shape[0]
    return kept.shape[0] - 1 if isinstance(kept, FakeTensor) or kept.is_meta else int(kept[0])


def _rows(x: Tensor, kept: Tensor | None = None) -> int:
    return x[0].numel() // x.shape[-1] * _samples(x, kept) if x.numel() else 0


def _product(rows: int, weight: Tensor) -> int:
    return 2 * rows * weight.numel()


@register_flop_formula(_OPS.linear, get_raw=True)
def _linear(x, weight, *_, out_val=None) -> int:
    return _product(_rows(x), weight)


@register_flop_formula(_OPS.layer_norm_linear, get_raw=True)
def _layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias, kept, capacity, out_val=None) -> int:
    return _product(_rows(x, kept), weight)


@register_flop_formula(_OPS.layer_norm_qkv, get_raw=True)
def _layer_norm_qkv(x, norm_weight, norm_bias, eps, q_weight, *_, out_val=None) -> int:
    return 3 * _product(_rows(x), q_weight)


@register_flop_formula(_OPS.linear_residual, get_raw=True)
def _linear_residual(x, weight, bias, residual, layer_scale, scale, activation, kept, out_val=None) -> int:
    return _product(_rows(x, kept), weight)


@register_flop_formula(_OPS.mlp, get_raw=True)
def _mlp(x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, *rest, out_val=None) -> int:
    rows = _rows(x, rest[-1])
    return _product(rows, fc1_weight) + _product(rows, fc2_weight)


@register_flop_formula(_OPS.linear_backward, get_raw=True)
def _linear_backward(grad, x, weight, bias, layer_scale, scale, activation, kept, needs, out_val=None) -> int:
    need_x, need_weight, _, need_layer_scale = needs
    return (need_x + (need_weight or need_layer_scale)) * _product(_rows(x, kept), weight)


@register_flop_formula(_OPS.layer_norm_linear_backward, get_raw=True)
def _layer_norm_linear_backward(
    x, norm_weight, norm_bias, eps, grads, weights, biases, kept, residual_grad, needs, out_val=None
) -> int:
    products = any(needs[:3]) * len(weights) + sum(needs[3 : 3 + len(weights)])
    return products * _product(_rows(x, kept), weights[0])


@register_flop_formula(_OPS.attention, get_raw=True)
def _attention(qkv, scale, kept, out_val=None) -> int:
    _, tokens, _, heads, head_dim = qkv.shape
    return 4 * _samples(qkv, kept) * heads * tokens * tokens * head_dim


@register_flop_formula(_OPS.attention_backward, get_raw=True)
def _attention_backward(grad, qkv, out, log_sum_exp, scale, kept, out_val=None) -> int:
    return _attention(qkv, scale, kept) // 2 * _backward_products(qkv)


@register_flop_formula(_OPS.attention_qkv, get_raw=True)
def _attention_qkv(q, k, *_, out_val=None) -> int:
    return 4 * q.numel() * k.shape[1]


@register_flop_formula(_OPS.attention_qkv_backward, get_raw=True)
def _attention_qkv_backward(grad, q, k, *_, out_val=None) -> int:
    return 2 * _backward_products(q) * q.numel() * k.shape[1]


def _backward_products(q: Tensor) -> int:
    """Of the tokens with the tokens: the kernels find the scores and their gradients twice, for the queries' gradient
    and for the keys' and values'.
    """
    return 7 if use_triton(q) else 5


@register_flop_formula(_OPS.patch_embed, get_raw=True)
def _patch_embed(images, weight, *_, out_val=None) -> int:
    patches = images.shape[0] * images.shape[2] * images.shape[3] // (weight.shape[2] * weight.shape[3])
    return _product(patches, weight)


@register_flop_formula(_OPS.patch_embed_backward, get_raw=True)
def _patch_embed_backward(grad, images, weight, *rest, out_val=None) -> int:
    need_images, need_weight, *_ = rest[-1]
    return (need_images + need_weight) * _patch_embed(images, weight)


def _readout_parts(x: Tensor, q_weight: Tensor, rows: int, heads: int) -> tuple[int, int]:
    """One product with a projection's weight for the rows read; one with all tokens' normalised rows."""
    batch, tokens, width = x.shape
    return _product(batch * rows, q_weight), 2 * batch * rows * heads * tokens * width


def _readout(x: Tensor, q_weight: Tensor, rows: int, heads: int) -> int:
    projection, over_tokens = _readout_parts(x, q_weight, rows, heads)
    return 3 * projection + 2 * over_tokens


@register_flop_formula(_OPS.readout_attention, get_raw=True)
def _readout_attention(x, norm_weight, norm_bias, eps, weight, bias, rows, heads, scale, out_val=None) -> int:
    return _readout(x, weight[: weight.shape[0] // 3], rows, heads)


@register_flop_formula(_OPS.readout_attention_qkv, get_raw=True)
def _readout_attention_qkv(x, norm_weight, norm_bias, eps, q_weight, *rest, out_val=None) -> int:
    return _readout(x, q_weight, rest[-3], rest[-2])


@register_flop_formula(_OPS.readout_attention_backward, get_raw=True)
def _readout_attention_backward(
    grad, residual_grad, x, norm_weight, norm_bias, eps, weights, biases, q, absorbed, summed, log_sum_exp,
    heads, scale, needs, out_val=None,
) -> int:  # fmt: skip
    need_x, need_norm_weight, need_norm_bias, need_q, need_k, need_v, need_q_bias, *_ = needs
    projection, over_tokens = _readout_parts(x, weights[0], q.shape[1], heads)
    of_norm = need_x or need_norm_weight or need_norm_bias
    flops = need_v * projection
    if of_norm or need_q or need_k or need_q_bias:
        flops += (2 + need_k + of_norm + need_q) * projection + 5 * over_tokens
    return flops
