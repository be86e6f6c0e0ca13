"""Gradients of LayerNorm where it stands alone, and of residual add + LayerNorm."""

import torch
from torch import Tensor

from deit_fast.kernels import layer_norm_backward as kernels
from deit_fast.ops import checks
from deit_fast.ops.registration import register_backward


def _stock(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual_grad: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """`residual_grad` is added to the input's gradient: what flows past the LayerNorm."""
    parameters = [None if p is None else p.to(x.dtype) for p in (weight, bias)]
    shape = [x.shape[-1]]
    _, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, *parameters, eps)
    found = list(torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, *parameters, needs))
    if needs[0] and residual_grad is not None:
        found[0] = found[0] + residual_grad
    inputs = (x, weight, bias)
    return [g.to(i.dtype) for g, i, need in zip(found, inputs, needs, strict=True) if need]


def _triton(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual_grad: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    gradients = []
    if needs[0]:
        dx, mean, rstd = kernels.layer_norm_backward(grad, x, weight, eps, residual_grad=residual_grad)
        gradients.append(dx)
    else:
        mean, rstd = kernels.row_statistics(x, eps)
    if any(needs[1:]):
        found = kernels.layer_norm_parameter_gradients(grad, x, mean, rstd)
        inputs = (weight, bias)
        gradients += [g.to(i.dtype) for g, i, need in zip(found, inputs, needs[1:], strict=True) if need]
    return gradients


def _fake(grad, x, weight, bias, eps, residual_grad, needs):
    inputs = (x, weight, bias)
    return [torch.empty(i.shape, dtype=i.dtype, device=i.device) for i, n in zip(inputs, needs, strict=True) if n]


layer_norm_backward = register_backward(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual_grad, bool[] needs) -> Tensor[]",
    stock=_stock,
    triton=_triton,
    unsupported=lambda grad, x, weight, bias, *_: checks.kernel_dtypes(grad, x, weight, bias),
    fake=_fake,
)
