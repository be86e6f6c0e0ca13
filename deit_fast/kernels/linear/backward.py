"""Gradients of the GEMM family: plain products, of operands that are made for them once.

Neither LayerNorm's output nor GELU's is kept: what makes the input's gradient makes them again in passing, for the
weight's. `needs` has a flag for each gradient, in the order of their inputs; the gradients asked for come back in that
order.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels.device import approximation
from deit_fast.kernels.layer_norm.backward import layer_norm_input_gradient, normalised_rows
from deit_fast.kernels.linear.branch_gradient import branch_gradient
from deit_fast.kernels.linear.input_gradient import input_gradient
from deit_fast.kernels.linear.parameter_gradients import (
    layer_norm_linear_parameter_gradients,
    linear_parameter_gradients,
)
from deit_fast.kernels.linear.scaled_weight import scaled_weight


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    input_activation: str,
    kept: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Of x, weight, bias and layer_scale, each like its input, of `linear` and `linear_residual`.

    grad: [..., N]; x: [..., K], before the activation; weight: [N, K]; bias, layer_scale: [N]; drop_path_scale: [B].
    With `kept` (see `drop_path.keep_samples`) grad is full and x packed.
    """
    if not any(needs):
        return []
    need_x, need_weight, _, need_layer_scale = needs
    need_product = need_weight or need_layer_scale
    gradients = []
    grad = branch_gradient(grad, drop_path_scale, kept, x.shape[0], weight.dtype)
    activated = None
    if need_x:
        scaled, factor = (weight, None) if layer_scale is None else scaled_weight(weight, layer_scale)
        dx, activated = input_gradient(
            (grad,),
            (scaled,),
            layer_scale=factor,
            gelu_of=x,
            activation=input_activation,
            need_activated=need_product,
            kept=kept,
        )
        gradients.append(dx.to(x.dtype))
    if any(needs[1:]):
        if activated is None:
            activated = x
            if need_product and input_activation != "none":
                activated = F.gelu(x, approximate=approximation(input_activation))
        found = linear_parameter_gradients(
            grad, activated.to(weight.dtype), weight, bias, layer_scale=layer_scale, needs=needs[1:], kept=kept
        )
        gradients += [gradient for gradient in found if gradient is not None]
    return gradients


def layer_norm_linear_backward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kept: Tensor | None,
    residual_grad: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Of x, norm_weight, norm_bias, weights and biases, each like its input, of `layer_norm_linear`.

    x: [..., K]; norm_weight, norm_bias: [K]; each of grads: [..., N], of weights: [N, K], of biases: [N].
    `residual_grad`, like x, of what went past the projections, is added to x's. With `kept` (see
    `drop_path.keep_samples`) grads are packed, the rest is full.
    """
    need_product = any(needs[1 : 3 + len(weights)])
    dtype, capacity = weights[0].dtype, None if kept is None else grads[0].shape[0]
    gradients, normalised = [], None
    if needs[0]:
        of_norm, _ = input_gradient(grads, weights, kept=kept)
        dx, normalised = layer_norm_input_gradient(
            of_norm, x, norm_weight, eps, residual_grad=residual_grad, kept=kept,
            normalised_dtype=dtype if need_product else None,
        )  # fmt: skip
        gradients.append(dx)
    elif need_product:
        normalised = normalised_rows(x, eps, dtype, kept, capacity)
    if any(needs[1:]):
        found = layer_norm_linear_parameter_gradients(
            grads, normalised, norm_weight, norm_bias, weights, biases, needs[1:], kept
        )
        gradients += [gradient for gradient in found if gradient is not None]
    return gradients
