"""Gradients of the GEMM family: the input's from one GEMM, the parameters' all from one more.

Neither LayerNorm's output nor GELU's is kept. `needs` has a flag for each gradient, in the order of their inputs; the
gradients asked for come back in that order.
"""

from collections.abc import Sequence

from torch import Tensor

from deit_fast.kernels.layer_norm.backward import layer_norm_input_gradient, row_statistics
from deit_fast.kernels.linear.input_gradient import input_gradient
from deit_fast.kernels.linear.parameter_gradients import (
    layer_norm_linear_parameter_gradients,
    linear_parameter_gradients,
)


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

    grad: [..., N]; x: [..., K]; weight: [N, K]; bias, layer_scale: [N]; drop_path_scale: [B]. With `kept` (see
    `drop_path.keep_samples`) grad is full and x packed.
    """
    gradients = []
    if needs[0]:
        gelu_of = None if input_activation == "none" else x
        capacity = None if kept is None else x.shape[0]
        dx = input_gradient(
            (grad,),
            (weight,),
            layer_scale=layer_scale,
            drop_path_scale=drop_path_scale,
            gelu_of=gelu_of,
            activation=input_activation,
            kept=kept,
            capacity=capacity,
        )
        gradients.append(dx.to(x.dtype))
    if any(needs[1:]):
        found = linear_parameter_gradients(
            grad,
            x,
            weight,
            bias,
            layer_scale=layer_scale,
            drop_path_scale=drop_path_scale,
            activation=input_activation,
            needs=needs[1:],
            kept=kept,
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
    gradients = []
    if needs[0]:
        of_norm = input_gradient(grads, weights, kept=kept, packed_grad=True)
        dx, mean, rstd = layer_norm_input_gradient(of_norm, x, norm_weight, eps, residual_grad=residual_grad, kept=kept)
        gradients.append(dx)
    elif any(needs):
        capacity = None if kept is None else grads[0].shape[0]
        mean, rstd = row_statistics(x, eps, kept, capacity)
    if any(needs[1:]):
        found = layer_norm_linear_parameter_gradients(
            grads, x, mean, rstd, norm_weight, norm_bias, weights, biases, needs[1:], kept
        )
        gradients += [gradient for gradient in found if gradient is not None]
    return gradients
