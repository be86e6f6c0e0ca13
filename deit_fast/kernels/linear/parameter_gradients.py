"""The parameters' gradients of the GEMM family, from one product that is split over the tokens (weight_gradient.py).

A launch adds G's and g's partial sums in a fixed order and turns them into the gradients. Of a linear layer:

    dW = layer_scale G        db = layer_scale g      dlayer_scale = Σ_k W G + b g

and with x = x̂, the rows that a LayerNorm of weight γ and bias β has normalised:

    dW = γ G + g βᵀ           db = g                  dγ = Σ_n W G,  dβ = Wᵀ g

so that no token is read for LayerScale, γ or β.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.launching import hardware, run
from deit_fast.kernels.launching.layout import as_rows, dense, one_stride
from deit_fast.kernels.launching.metadata import described
from deit_fast.kernels.layer_norm.backward import column_sums
from deit_fast.kernels.linear import settings
from deit_fast.kernels.linear.weight_gradient import weight_gradient_partials


@triton.jit(
    **described(
        "finish_linear_kernel",
        lambda a: (a["SPLITS"], a["out_features"], a["in_features"]),
        ("weight_grad_ptr", "bias_grad_ptr", "layer_scale_grad_ptr", "layer_scale_ptr"),
    )
)
def finish_linear_kernel(
    product_ptr,  # [SPLITS, out_features, in_features], float32
    sum_ptr,  # [SPLITS, out_features], float32, or None
    weight_ptr,  # [out_features, in_features]
    bias_ptr,  # [out_features] or None
    layer_scale_ptr,  # [out_features] or None
    weight_grad_ptr,  # [out_features, in_features] or None
    bias_grad_ptr,  # [out_features] or None
    layer_scale_grad_ptr,  # [out_features] or None
    weight_stride,
    split_stride,
    in_features,
    out_features,
    SPLITS: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
):
    """`dW = layer_scale G`, `db = layer_scale g`, `dlayer_scale = Σ_k W G + b g`: OUT_BLOCK whole rows of them."""
    n = tl.program_id(0) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    n_mask = n < out_features
    if layer_scale_ptr is not None:
        layer_scale = tl.load(layer_scale_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    of_scale = tl.zeros([OUT_BLOCK, IN_BLOCK], dtype=tl.float32)
    for start in range(0, in_features, IN_BLOCK):
        k = start + tl.arange(0, IN_BLOCK)
        mask = n_mask[:, None] & (k < in_features)[None, :]
        offset = n.to(tl.int64)[:, None] * in_features + k[None, :]
        product = _sum_splits(product_ptr + offset, mask, split_stride, SPLITS)
        if layer_scale_grad_ptr is not None:
            weight = tl.load(weight_ptr + n.to(tl.int64)[:, None] * weight_stride + k[None, :], mask=mask, other=0.0)
            of_scale += weight.to(tl.float32) * product
        if weight_grad_ptr is not None:
            if layer_scale_ptr is not None:
                product *= layer_scale[:, None]
            tl.store(weight_grad_ptr + offset, product.to(weight_grad_ptr.dtype.element_ty), mask=mask)
    if sum_ptr is not None:
        total = _sum_splits(sum_ptr + n, n_mask, out_features, SPLITS)
    if layer_scale_grad_ptr is not None:
        scale_grad = tl.sum(of_scale, axis=1)
        if bias_ptr is not None:
            scale_grad += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32) * total
        tl.store(layer_scale_grad_ptr + n, scale_grad.to(layer_scale_grad_ptr.dtype.element_ty), mask=n_mask)
    if bias_grad_ptr is not None:
        if layer_scale_ptr is not None:
            total *= layer_scale
        tl.store(bias_grad_ptr + n, total.to(bias_grad_ptr.dtype.element_ty), mask=n_mask)


@triton.jit(
    **described(
        "finish_layer_norm_linear_kernel",
        lambda a: (a["SPLITS"], a["PROJECTIONS"] * a["out_features"], a["in_features"]),
        ("k_weight_ptr", "weight_grad_ptr", "bias_grad_ptr", "norm_weight_grad_ptr", "norm_bias_grad_ptr"),
    )
)
def finish_layer_norm_linear_kernel(
    product_ptr,  # [SPLITS, PROJECTIONS * out_features, in_features], float32
    sum_ptr,  # [SPLITS, PROJECTIONS * out_features], float32, or None
    weight_ptr,  # [out_features, in_features]; of q where there are three
    k_weight_ptr,  # [out_features, in_features] or None
    v_weight_ptr,  # [out_features, in_features] or None
    norm_weight_ptr,  # [in_features] or None
    norm_bias_ptr,  # [in_features] or None
    weight_grad_ptr,  # [out_features, in_features] or None
    k_weight_grad_ptr,  # [out_features, in_features] or None
    v_weight_grad_ptr,  # [out_features, in_features] or None
    bias_grad_ptr,  # [out_features] or None
    k_bias_grad_ptr,  # [out_features] or None
    v_bias_grad_ptr,  # [out_features] or None
    norm_weight_grad_ptr,  # [in_features] or None
    norm_bias_grad_ptr,  # [in_features] or None
    weight_stride,
    split_stride,
    in_features,
    out_features,
    PROJECTIONS: tl.constexpr,
    SPLITS: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
):
    """`dW = γ G + g βᵀ`, `db = g`, `dγ = Σ_n W G`, `dβ = Wᵀ g`: IN_BLOCK whole columns of them."""
    k = tl.program_id(0) * IN_BLOCK + tl.arange(0, IN_BLOCK)
    k_mask = k < in_features
    of_norm_weight = tl.zeros([OUT_BLOCK, IN_BLOCK], dtype=tl.float32)
    of_norm_bias = tl.zeros([OUT_BLOCK, IN_BLOCK], dtype=tl.float32)
    weights = (weight_ptr, k_weight_ptr, v_weight_ptr)
    weight_grads = (weight_grad_ptr, k_weight_grad_ptr, v_weight_grad_ptr)
    bias_grads = (bias_grad_ptr, k_bias_grad_ptr, v_bias_grad_ptr)
    for i in tl.static_range(PROJECTIONS):
        of_norm_weight, of_norm_bias = _finish_projection(
            of_norm_weight, of_norm_bias, product_ptr, sum_ptr, weights[i], norm_weight_ptr, norm_bias_ptr,
            weight_grads[i], bias_grads[i], norm_weight_grad_ptr, norm_bias_grad_ptr, k, k_mask, weight_stride,
            split_stride, in_features, out_features, i, PROJECTIONS, SPLITS, OUT_BLOCK,
        )  # fmt: skip
    if norm_weight_grad_ptr is not None:
        total = tl.sum(of_norm_weight, axis=0)
        tl.store(norm_weight_grad_ptr + k, total.to(norm_weight_grad_ptr.dtype.element_ty), mask=k_mask)
    if norm_bias_grad_ptr is not None:
        total = tl.sum(of_norm_bias, axis=0)
        tl.store(norm_bias_grad_ptr + k, total.to(norm_bias_grad_ptr.dtype.element_ty), mask=k_mask)


@triton.jit
def _finish_projection(
    of_norm_weight, of_norm_bias, product_ptr, sum_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr,
    weight_grad_ptr, bias_grad_ptr, norm_weight_grad_ptr, norm_bias_grad_ptr, k, k_mask, weight_stride,
    split_stride, in_features, out_features, PROJECTION: tl.constexpr, PROJECTIONS: tl.constexpr,
    SPLITS: tl.constexpr, OUT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds W ⊙ G and W ⊙ g to `of_norm_weight` and `of_norm_bias`, to be summed over their rows."""
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
    if norm_bias_ptr is not None:
        norm_bias = tl.load(norm_bias_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
    for start in range(0, out_features, OUT_BLOCK):
        n = start + tl.arange(0, OUT_BLOCK)
        n_mask = n < out_features
        mask = n_mask[:, None] & k_mask[None, :]
        n_offset = n.to(tl.int64)[:, None]
        products = product_ptr + (n_offset + PROJECTION * out_features) * in_features + k[None, :]
        product = _sum_splits(products, mask, split_stride, SPLITS)
        if sum_ptr is not None:
            total = _sum_splits(sum_ptr + PROJECTION * out_features + n, n_mask, PROJECTIONS * out_features, SPLITS)
        if norm_weight_grad_ptr is not None or norm_bias_grad_ptr is not None:
            weight = tl.load(weight_ptr + n_offset * weight_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
            if norm_weight_grad_ptr is not None:
                of_norm_weight += weight * product
            if norm_bias_grad_ptr is not None:
                of_norm_bias += weight * total[:, None]
        if weight_grad_ptr is not None:
            if norm_weight_ptr is not None:
                product *= norm_weight[None, :]
            if norm_bias_ptr is not None:
                product += total[:, None] * norm_bias[None, :]
            product = product.to(weight_grad_ptr.dtype.element_ty)
            tl.store(weight_grad_ptr + n_offset * in_features + k[None, :], product, mask=mask)
        if bias_grad_ptr is not None and tl.program_id(0) == 0:
            tl.store(bias_grad_ptr + n, total.to(bias_grad_ptr.dtype.element_ty), mask=n_mask)
    return of_norm_weight, of_norm_bias


@triton.jit
def _sum_splits(pointers, mask, stride, SPLITS: tl.constexpr):
    """In their order, unrolled by 8, so that as many loads are under way at once."""
    total = tl.load(pointers, mask=mask, other=0.0)
    for _ in range((SPLITS - 1) // 8):
        for _ in tl.static_range(8):
            pointers += stride
            total += tl.load(pointers, mask=mask, other=0.0)
    for _ in tl.static_range((SPLITS - 1) % 8):
        pointers += stride
        total += tl.load(pointers, mask=mask, other=0.0)
    return total


def linear_parameter_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True),
    kept: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of weight, bias and layer_scale, each in its parameter's dtype; None where absent or not needed.

    grad [..., N] is that of `layer_scale * (x @ weight.T + bias)`; grad and x [..., K] are in weight's dtype, and with
    `kept` (see `drop_path.keep_samples`) packed.
    """
    outputs = _allocate((weight, bias, layer_scale), needs)
    of_weight, of_bias, of_layer_scale = outputs
    if not grad.numel() or not x.numel():
        return _without_tokens(outputs)
    if of_weight is None and of_layer_scale is None:
        if bias is not None and of_bias is not None:
            of_bias = column_sums(grad, bias.dtype, scale=layer_scale, kept=kept)
        return [None, of_bias, None]
    product, total = weight_gradient_partials(
        (grad,),
        x,
        kept=kept,
        need_sum=of_bias is not None or (of_layer_scale is not None and bias is not None),
    )
    weight = as_rows(weight)
    out_features, in_features = weight.shape
    tile = settings.FINISH_LINEAR
    run.run(
        finish_linear_kernel,
        triton.cdiv(out_features, tile.rows),
        grad.device,
        product,
        total,
        weight,
        dense(bias),
        dense(layer_scale),
        *outputs,
        weight.stride(0),
        product.stride(0),
        in_features,
        out_features,
        SPLITS=product.shape[0],
        OUT_BLOCK=tile.rows,
        IN_BLOCK=tile.columns,
        num_warps=tile.num_warps,
    )
    return outputs


def layer_norm_linear_parameter_gradients(
    grads: Sequence[Tensor],
    normalised: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    needs: Sequence[bool] | None = None,
    kept: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of norm_weight, norm_bias, weights and biases, in this order; None where absent or not needed.

    Of one projection `LN(x) @ weight.T + bias`, or three of the same shape: grads [..., N], weights [N, K]. normalised:
    x̂ [..., K] in weights' dtype, as `layer_norm_input_gradient` and `normalised_rows` return it; None where nothing but
    biases' gradients are needed. With `kept` (see `drop_path.keep_samples`) grads and x̂ are packed.
    """
    parameters = (norm_weight, norm_bias, *weights, *biases)
    outputs = _allocate(parameters, needs or [True] * len(parameters))
    projections = len(weights)
    of_norm, of_weights, of_biases = outputs[:2], outputs[2 : 2 + projections], outputs[2 + projections :]
    if not grads[0].numel():
        return _without_tokens(outputs)
    if normalised is None or all(o is None for o in (*of_norm, *of_weights)):
        sums = [
            None if b is None else column_sums(g, b.dtype, kept=kept) for g, b in zip(grads, of_biases, strict=True)
        ]
        return [None] * (2 + projections) + sums
    of_norm_bias = of_norm[1]
    product, total = weight_gradient_partials(
        grads,
        normalised,
        kept=kept,
        need_sum=any(b is not None for b in (norm_bias, of_norm_bias, *of_biases)),
    )
    weights = one_stride(weights)
    absent = (None,) * (3 - projections)
    out_features, in_features = weights[0].shape
    tile = settings.finish_layer_norm_linear(hardware.architecture(product))
    run.run(
        finish_layer_norm_linear_kernel,
        triton.cdiv(in_features, tile.columns),
        product.device,
        product,
        total,
        *weights,
        *absent,
        dense(norm_weight),
        dense(norm_bias),
        *of_weights,
        *absent,
        *of_biases,
        *absent,
        *of_norm,
        weights[0].stride(0),
        product.stride(0),
        in_features,
        out_features,
        PROJECTIONS=projections,
        SPLITS=product.shape[0],
        OUT_BLOCK=tile.rows,
        IN_BLOCK=tile.columns,
        num_warps=tile.num_warps,
    )
    return outputs


def _allocate(parameters: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.empty(p.shape, dtype=p.dtype, device=p.device) if need and p is not None else None
        for p, need in zip(parameters, needs, strict=True)
    ]


def _without_tokens(outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if o is None else o.zero_() for o in outputs]
