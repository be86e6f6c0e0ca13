"""LayerNorm, and residual add + LayerNorm, over the last dimension (Ba et al. 2016, equation 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import layer_norm as kernels
from deit_fast.ops import checks
from deit_fast.ops.layer_norm_backward import layer_norm_backward
from deit_fast.ops.registration import cast, distribute, register


def stock_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`F.layer_norm` for parameters whose dtype may differ from the input's (autocast's fused operators)."""
    if weight is not None and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    op = "layer_norm"
    checks.floating(op, "the input", x)
    checks.at_least_1d(op, "the input", x)
    checks.vector(op, "weight", weight, x.shape[-1])
    checks.vector(op, "bias", bias, x.shape[-1])
    checks.same_device(op, x, weight=weight, bias=bias)


def _unsupported(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    return kernels.unsupported(x.shape[-1]) or checks.kernel_dtypes(x, weight, bias)


def _save(ctx, args, y):
    x, weight, bias, eps = args
    ctx.save_for_backward(x, weight, bias)
    ctx.eps = eps


def _backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:3])
    found = layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps, None, needs)
    return *distribute(found, needs), None


_layer_norm = register(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    check=_check,
    stock=stock_layer_norm,
    triton=kernels.layer_norm,
    unsupported=_unsupported,
    fake=lambda x, weight, bias, eps: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    autocast=lambda dtype, x, weight, bias, eps: (
        cast(x, torch.float32),
        cast(weight, torch.float32),
        cast(bias, torch.float32),
        eps,
    ),
    save=_save,
    backward=_backward,
)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of `x` [..., D] over D: `(x - mean) / sqrt(var + eps) * weight + bias`, var biased.

    weight, bias: [D] or None. Statistics in float32; the result has the input's dtype, float32 under autocast.
    """
    return _layer_norm(x, weight, bias, eps)


def _stock_add(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    total = (x + residual).contiguous()
    return total, stock_layer_norm(total, weight, bias, eps)


def _check_add(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    if x.shape != residual.shape:
        raise ValueError(
            f"deit_fast.add_layer_norm: x and residual must have one shape, got {tuple(x.shape)} and "
            f"{tuple(residual.shape)}"
        )
    checks.floating("add_layer_norm", "residual", residual)
    checks.same_device("add_layer_norm", x, residual=residual)
    _check(x, weight, bias, eps)


def _unsupported_add(x: Tensor, residual: Tensor, weight, bias, eps: float) -> str | None:
    return kernels.unsupported(x.shape[-1]) or checks.kernel_dtypes(x, residual, weight, bias)


def _fake_add(x: Tensor, residual: Tensor, weight, bias, eps: float):
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    return total, torch.empty_like(total)


def _save_add(ctx, args, outputs):
    x, residual, weight, bias, eps = args
    ctx.save_for_backward(outputs[0], weight, bias)
    ctx.eps, ctx.dtypes = eps, (x.dtype, residual.dtype)


def _backward_add(ctx, of_total, of_y):
    total, weight, bias = ctx.saved_tensors
    need_x, need_residual, *need_parameters, _ = ctx.needs_input_grad
    if of_y is None:
        found = [of_total, *(None if p is None else torch.zeros_like(p) for p in (weight, bias))]
    else:
        needs = [need_x or need_residual, *need_parameters]
        found = distribute(layer_norm_backward(of_y, total, weight, bias, ctx.eps, of_total, needs), needs)
    x_dtype, residual_dtype = ctx.dtypes
    dx = found[0].to(x_dtype) if need_x else None
    dresidual = found[0].to(residual_dtype) if need_residual else None
    return dx, dresidual, found[1], found[2], None


_add_layer_norm = register(
    "add_layer_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    check=_check_add,
    stock=_stock_add,
    triton=kernels.add_layer_norm,
    unsupported=_unsupported_add,
    fake=_fake_add,
    autocast=lambda dtype, x, residual, weight, bias, eps: (
        cast(x, torch.float32),
        cast(residual, torch.float32),
        cast(weight, torch.float32),
        cast(bias, torch.float32),
        eps,
    ),
    save=_save_add,
    backward=_backward_add,
)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`(x + residual, LayerNorm(x + residual))` in one pass; shapes [..., D].

    The sum has the promoted dtype of the two; under autocast both results are float32.
    """
    return _add_layer_norm(x, residual, weight, bias, eps)
