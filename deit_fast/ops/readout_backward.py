"""Gradients of readout attention: x's in one pass, the parameters' from the few rows that were read.

With du the gradient of what the values' weight multiplies, a the absorbed queries, z what the softmax summed,
p its weights and x̂ the normalised rows:

    dz = γ du,  ds = p (dz · x̂ − dz · z),  dx̂ = Σ p dz + ds γ a,  da = γ Σ ds x̂,
    dγ = Σ du z + a Σ ds x̂,  dβ = Σ du, and then what flows back through the queries.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from deit_fast.kernels import readout_backward as kernels
from deit_fast.kernels.readout import unsupported
from deit_fast.ops import checks
from deit_fast.ops.linear_backward import _stock_layer_norm_linear_backward, _triton_layer_norm_linear_backward
from deit_fast.ops.product_dtype import as_dtype, product_dtype
from deit_fast.ops.registration import distribute, register_backward


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`weight * x + bias`, LayerNorm's second half."""
    x = x if weight is None else x * as_dtype(weight, x.dtype)
    return x if bias is None else x + as_dtype(bias, x.dtype)


def to_heads(x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """Head by head `scale * x @ weight`: x [B, R, H·K], weight [H, K, L] → [B, R, H, L], in the weight's dtype."""
    heads, depth, width = weight.shape
    dtype = product_dtype(weight)
    rows = as_dtype(x, dtype).reshape(-1, heads, depth).transpose(0, 1)
    weight_, none = as_dtype(weight, dtype), rows.new_empty(())
    product = torch.baddbmm(none, rows, weight_, beta=0, alpha=scale).transpose(0, 1)
    # Row by row in memory, as a compiler that has only seen shapes takes it to be.
    return as_dtype(product, weight.dtype).contiguous().view(*x.shape[:2], heads, width)


def stock_normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x̂ in float32 (float64 for float64), and the mean and 1 / standard deviation of each row."""
    x = as_dtype(x, torch.promote_types(x.dtype, torch.float32))
    return torch.ops.aten.native_layer_norm(x, [x.shape[-1]], None, None, eps)


def _stock_readout_backward(x, absorbed, norm_weight, eps, summed, log_sum_exp, dsummed, _):
    normalised, mean, rstd = stock_normalised(x, eps)
    queries = affine(absorbed.to(normalised.dtype), norm_weight, None).flatten(1, 2)
    dsummed, summed = dsummed.flatten(1, 2), summed.flatten(1, 2)
    weights = (queries @ normalised.mT - log_sum_exp.flatten(1).unsqueeze(-1)).exp_()
    dscores = dsummed @ normalised.mT - (dsummed * summed).sum(-1, keepdim=True)
    dscores *= weights
    dabsorbed = (dscores @ normalised).view(absorbed.shape)
    dnormalised = torch.baddbmm(weights.mT @ dsummed, dscores.mT, queries)
    wide = as_dtype(x, normalised.dtype)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dnormalised, wide, [x.shape[-1]], mean, rstd, None, None, [True, False, False]
    )
    return as_dtype(dx, x.dtype), dabsorbed


def _implementation(layer_norm_linear_backward: Callable, readout_backward: Callable) -> Callable:
    """The operator around the two parts that have kernels; the small products are torch's in either path."""

    def differentiate(
        grad: Tensor,
        residual_grad: Tensor | None,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        weights: list[Tensor],
        biases: list[Tensor | None],
        q: Tensor,
        absorbed: Tensor,
        summed: Tensor,
        log_sum_exp: Tensor,
        heads: int,
        scale: float,
        needs: list[bool],
    ) -> list[Tensor]:
        need_x, need_norm_weight, need_norm_bias, need_q, need_k, need_v, need_q_bias, need_k_bias, need_v_bias = needs
        q_weight, k_weight, v_weight = weights
        dtype, wide, depth = q_weight.dtype, summed.dtype, x.shape[-1]
        k_by_head, v_by_head = (w.view(heads, -1, depth) for w in (k_weight, v_weight))
        gradients: dict[str, Tensor] = {}
        if need_v:
            weighted = as_dtype(affine(summed, norm_weight, norm_bias), dtype)
            gradients["v"] = _weight_gradient(grad.unflatten(-1, (heads, -1)), weighted)
        if need_v_bias:
            gradients["v_bias"] = grad.sum((0, 1), dtype=wide)
        if need_k_bias:
            gradients["k_bias"] = torch.zeros_like(biases[1])

        if need_x or need_norm_weight or need_norm_bias or need_q or need_k or need_q_bias:
            dweighted = to_heads(grad, v_by_head).to(wide)
            dsummed = affine(dweighted, norm_weight, None)
            dx, dscaled = readout_backward(x, absorbed, norm_weight, eps, summed, log_sum_exp, dsummed, dtype)
            dabsorbed = as_dtype(affine(dscaled, norm_weight, None), dtype)
            if need_k:
                gradients["k"] = _weight_gradient(q.unflatten(-1, (heads, -1)), dabsorbed) * scale
            dq = to_heads(dabsorbed.flatten(2), k_by_head.mT, scale).flatten(2)
            q_needs = [need_x, need_norm_weight, need_norm_bias, need_q, need_q_bias]
            rows = x[:, : q.shape[1]]
            found = layer_norm_linear_backward(
                rows, norm_weight, norm_bias, eps, [dq], [q_weight], [biases[0]], None, residual_grad, q_needs
            )
            of_rows, of_norm_weight, of_norm_bias, of_q, of_q_bias = distribute(found, q_needs)
            gradients |= {"q": of_q, "q_bias": of_q_bias}
            if need_x:
                gradients["x"] = dx
                dx[:, : q.shape[1]] += of_rows
            if need_norm_weight:
                here = torch.einsum("brhd,brhd->d", dweighted, summed)
                here += torch.einsum("brhd,brhd->d", absorbed.to(wide), dscaled)
                gradients["norm_weight"] = here + of_norm_weight
            if need_norm_bias:
                gradients["norm_bias"] = dweighted.sum((0, 1, 2)) + of_norm_bias

        inputs = (x, norm_weight, norm_bias, *weights, *biases)
        names = ("x", "norm_weight", "norm_bias", "q", "k", "v", "q_bias", "k_bias", "v_bias")
        return [gradients[n].to(i.dtype) for n, i, need in zip(names, inputs, needs, strict=True) if need]

    return differentiate


def _weight_gradient(of_output: Tensor, of_input: Tensor) -> Tensor:
    """Head by head `of_outputᵀ @ of_input`: [B, R, H, K] and [B, R, H, L] → [H·K, L]."""
    dtype = product_dtype(of_input)
    left, right = (as_dtype(t, dtype).flatten(0, 1).transpose(0, 1) for t in (of_output, of_input))
    return torch.bmm(left.mT, right).flatten(0, 1)


def _fake(grad, residual_grad, x, norm_weight, norm_bias, eps, weights, biases, *rest):
    inputs = (x, norm_weight, norm_bias, *weights, *biases)
    return [torch.empty(i.shape, dtype=i.dtype, device=i.device) for i, n in zip(inputs, rest[-1], strict=True) if n]


readout_attention_backward = register_backward(
    "readout_attention_backward",
    "(Tensor grad, Tensor? residual_grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "Tensor[] weights, Tensor?[] biases, Tensor q, Tensor absorbed, Tensor summed, Tensor log_sum_exp, "
    "int num_heads, float scale, bool[] needs) -> Tensor[]",
    stock=_implementation(_stock_layer_norm_linear_backward, _stock_readout_backward),
    triton=_implementation(_triton_layer_norm_linear_backward, kernels.readout_backward),
    unsupported=lambda grad, residual_grad, x, norm_weight, norm_bias, eps, weights, *_: (
        unsupported(x.shape[-1], weights[0].dtype)
        or checks.kernel_products(*weights, grad, residual_grad, x, norm_weight, norm_bias)
    ),
    fake=_fake,
)
