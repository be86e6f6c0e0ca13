"""Gradients of the GEMM family.

Every backward operator takes `needs`, a flag for each gradient it knows, and returns the gradients asked for, in
that order: a frozen weight costs nothing.
"""

import torch
from torch import Tensor

from deit_fast.kernels import launch
from deit_fast.kernels import layer_norm_backward as layer_norm_kernels
from deit_fast.kernels import linear_backward as kernels
from deit_fast.kernels.device import approximation
from deit_fast.ops import activation, checks, drop_path
from deit_fast.ops.product_dtype import as_dtype, product_dtype
from deit_fast.ops.registration import register_backward


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(0, x.shape[-1])


# linear and linear_residual ---------------------------------------------------------------------------------------


def _stock_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    input_activation: str,
    kept: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """LayerScale goes into weight-sized tensors, never into a pass over the tokens:

    with g = drop_path_scale * grad and G = gᵀ act(x), the gradients are dx = g (layer_scale W) act'(x),
    dW = layer_scale G, db = layer_scale Σg, dlayer_scale = Σ_k W G + b Σg.
    """
    need_x, need_weight, need_bias, need_layer_scale = needs
    dtype = product_dtype(weight)
    capacity, x = x.shape[0], drop_path.filled(x, kept)
    grad = drop_path.gather(grad, kept, capacity)
    if drop_path_scale is not None:
        grad = grad * drop_path.gather(drop_path_scale, kept, capacity).view(-1, *[1] * (grad.ndim - 1))
    grad = _rows(as_dtype(grad, dtype))
    gradients = []
    if need_x:
        scaled = weight if layer_scale is None else weight * layer_scale.unsqueeze(1)
        dx = as_dtype(grad @ as_dtype(scaled, dtype), x.dtype).view(x.shape)
        if input_activation != "none":
            dx = torch.ops.aten.gelu_backward(dx, x, approximate=approximation(input_activation))
        gradients.append(drop_path.with_room(dx, capacity))
    if need_weight or need_layer_scale:
        product = grad.T @ _rows(as_dtype(activation.apply(input_activation, x), dtype))
    if need_bias or need_layer_scale:
        total = grad.sum(0, dtype=torch.promote_types(dtype, torch.float32))
    if need_weight:
        scaled = product if layer_scale is None else product * layer_scale.unsqueeze(1)
        gradients.append(as_dtype(scaled, weight.dtype))
    if need_bias:
        gradients.append(as_dtype(total if layer_scale is None else total * layer_scale, bias.dtype))
    if need_layer_scale:
        wide = total.dtype
        of_scale = (weight.to(wide) * product.to(wide)).sum(1)
        if bias is not None:
            of_scale += bias * total
        gradients.append(of_scale.to(layer_scale.dtype))
    return gradients


def _triton_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    input_activation: str,
    kept: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    gradients = []
    scales = {"layer_scale": layer_scale, "drop_path_scale": drop_path_scale}
    if needs[0]:
        gelu_of = None if input_activation == "none" else x
        capacity = None if kept is None else x.shape[0]
        dx = kernels.input_gradient(
            grad, weight, **scales, gelu_of=gelu_of, activation=input_activation, kept=kept, capacity=capacity
        )
        gradients.append(as_dtype(dx, x.dtype))
    if any(needs[1:]):
        found = kernels.linear_parameter_gradients(
            grad, x, weight, bias, **scales, activation=input_activation, needs=tuple(needs[1:]), kept=kept
        )
        gradients += [gradient for gradient, need in zip(found, needs[1:], strict=True) if need]
    return gradients


def _fake_linear_backward(grad, x, weight, bias, layer_scale, drop_path_scale, input_activation, kept, needs):
    inputs = (x, weight, bias, layer_scale)
    return [torch.empty(i.shape, dtype=i.dtype, device=i.device) for i, n in zip(inputs, needs, strict=True) if n]


linear_backward = register_backward(
    "linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? layer_scale, Tensor? drop_path_scale, "
    "str input_activation, Tensor? kept, bool[] needs) -> Tensor[]",
    stock=_stock_linear_backward,
    triton=_triton_linear_backward,
    unsupported=lambda grad, x, weight, bias, layer_scale, drop_path_scale, *_: checks.kernel_products(
        weight, grad, x, bias, layer_scale, drop_path_scale
    ),
    fake=_fake_linear_backward,
)


# layer_norm_linear ------------------------------------------------------------------------------------------------


def _stock_layer_norm_linear_backward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    grads: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    kept: Tensor | None,
    residual_grad: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """For one projection of LayerNorm(x) or several (separate q, k, v): their `grads`, `weights` and `biases`.

    `residual_grad`, of what went past them, is added to x's.
    """
    batch, x = x.shape[0], drop_path.gather(x, kept, len(grads[0]))
    need_norm, need_weights, need_biases = needs[:3], needs[3 : 3 + len(weights)], needs[3 + len(weights) :]
    dtype = product_dtype(weights[0])
    wide = torch.promote_types(dtype, torch.float32)
    parameters = [None if p is None else as_dtype(p, x.dtype) for p in (norm_weight, norm_bias)]
    normalised, mean, rstd = torch.ops.aten.native_layer_norm(x, [x.shape[-1]], *parameters, eps)
    grads = [_rows(as_dtype(drop_path.filled(g, kept), dtype)) for g in grads]
    gradients = []
    if any(need_norm):
        of_norm = grads[0] @ as_dtype(weights[0], dtype)
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            of_norm += grad @ as_dtype(weight, dtype)
        of_norm = as_dtype(of_norm, x.dtype).view(x.shape)
        found = torch.ops.aten.native_layer_norm_backward(of_norm, x, [x.shape[-1]], mean, rstd, *parameters, need_norm)
        dx, *of_parameters = found
        if need_norm[0]:
            dx = drop_path.scatter(dx, kept, batch)
            gradients.append(dx if residual_grad is None else dx.add_(residual_grad))
        for gradient, need, like in zip(of_parameters, need_norm[1:], (norm_weight, norm_bias), strict=True):
            if need:
                gradients.append(as_dtype(gradient, like.dtype))
    if any(need_weights):
        normalised = _rows(as_dtype(normalised, dtype))
        for grad, weight, need in zip(grads, weights, need_weights, strict=True):
            if need:
                gradients.append(as_dtype(grad.T @ normalised, weight.dtype))
    for grad, bias, need in zip(grads, biases, need_biases, strict=True):
        if need:
            gradients.append(as_dtype(grad.sum(0, dtype=wide), bias.dtype))
    return gradients


def _triton_layer_norm_linear_backward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    grads: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    kept: Tensor | None,
    residual_grad: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    gradients = []
    if needs[0]:
        if len(grads) > 1:
            of_norm = kernels.input_gradient_qkv(grads, weights)
        else:
            of_norm = kernels.input_gradient(grads[0], weights[0], kept=kept, packed_grad=True)
        dx, mean, rstd = layer_norm_kernels.layer_norm_backward(
            of_norm, x, norm_weight, eps, residual_grad=residual_grad, kept=kept
        )
        gradients.append(dx)
    elif any(needs):
        capacity = None if kept is None else grads[0].shape[0]
        mean, rstd = layer_norm_kernels.row_statistics(x, eps, kept, capacity)
    if any(needs[1:]):
        found = kernels.layer_norm_linear_parameter_gradients(
            grads, x, mean, rstd, norm_weight, norm_bias, weights, biases, needs[1:], kept
        )
        gradients += [gradient for gradient, need in zip(found, needs[1:], strict=True) if need]
    return gradients


def _fake_layer_norm_linear_backward(
    x, norm_weight, norm_bias, eps, grads, weights, biases, kept, residual_grad, needs
):
    inputs = (x, norm_weight, norm_bias, *weights, *biases)
    return [torch.empty(i.shape, dtype=i.dtype, device=i.device) for i, n in zip(inputs, needs, strict=True) if n]


layer_norm_linear_backward = register_backward(
    "layer_norm_linear_backward",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor[] grads, Tensor[] weights, "
    "Tensor?[] biases, Tensor? kept, Tensor? residual_grad, bool[] needs) -> Tensor[]",
    stock=_stock_layer_norm_linear_backward,
    triton=_triton_layer_norm_linear_backward,
    unsupported=lambda x, norm_weight, norm_bias, eps, grads, weights, biases, kept, residual_grad, _: (
        (launch.no_separate_projections(weights[0]) if len(weights) > 1 else None)
        or checks.kernel_products(*weights, x, norm_weight, norm_bias, *grads, *biases, residual_grad)
    ),
    fake=_fake_layer_norm_linear_backward,
)
