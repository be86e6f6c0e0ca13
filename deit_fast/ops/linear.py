"""The GEMM family: a linear layer with what surrounds it in a transformer block fused into it.

Arithmetic runs in the weight's dtype. The input, the residual and the biases may be wider: that is what autocast
hands over (float32 stream, 16-bit weights).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import launch
from deit_fast.kernels import linear as kernels
from deit_fast.ops import checks, drop_path
from deit_fast.ops.activation import apply as apply_activation
from deit_fast.ops.activation import apply_ as apply_activation_
from deit_fast.ops.activation import check as check_activation
from deit_fast.ops.layer_norm import stock_layer_norm
from deit_fast.ops.linear_backward import layer_norm_linear_backward, linear_backward
from deit_fast.ops.product_dtype import as_dtype, product_dtype
from deit_fast.ops.registration import cast, distribute, register


def stock_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = product_dtype(weight)
    bias = None if bias is None else as_dtype(bias, dtype)
    return as_dtype(F.linear(as_dtype(x, dtype), as_dtype(weight, dtype), bias), weight.dtype)


def stock_residual(
    branch: Tensor,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    kept: Tensor | None,
) -> Tensor:
    if layer_scale is not None:
        branch = branch * layer_scale
    if drop_path_scale is not None:
        branch = branch * drop_path.gather(drop_path_scale, kept, len(branch)).view(-1, *[1] * (branch.ndim - 1))
    if kept is None:
        in_place = branch.dtype is torch.promote_types(residual.dtype, branch.dtype)
        return branch.add_(residual) if in_place else (residual + branch).contiguous()
    dtype = torch.promote_types(residual.dtype, branch.dtype)
    stream = residual.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return stream.index_add_(0, kept[1 : 1 + len(branch)], drop_path.filled(branch, kept).to(stream.dtype))


def residual_dtype(residual: Tensor, weight: Tensor, layer_scale: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(residual.dtype, weight.dtype)
    return dtype if layer_scale is None else torch.promote_types(dtype, layer_scale.dtype)


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.floating(op, "the input", x)
    checks.at_least_1d(op, "the input", x)
    checks.matrix(op, "weight", weight, x.shape[-1])
    checks.vector(op, "bias", bias, weight.shape[0])
    checks.same_device(op, x, weight=weight, bias=bias)


def check_norm(op: str, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    checks.vector(op, "norm_weight", norm_weight, x.shape[-1])
    checks.vector(op, "norm_bias", norm_bias, x.shape[-1])
    checks.same_device(op, x, norm_weight=norm_weight, norm_bias=norm_bias)


def check_residual(
    op: str,
    residual: Tensor,
    shape: tuple,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    kept: Tensor | None,
) -> None:
    if kept is not None:
        drop_path.check_kept(op, residual, kept)
        shape = (residual.shape[0], *shape[1:])
    if residual.shape != shape:
        raise ValueError(
            f"deit_fast.{op}: residual must have the output's shape {tuple(shape)}, got {tuple(residual.shape)}"
        )
    checks.vector(op, "layer_scale", layer_scale, shape[-1])
    checks.vector(op, "drop_path_scale", drop_path_scale, shape[0])
    checks.same_device(op, residual, layer_scale=layer_scale, drop_path_scale=drop_path_scale)


# linear -----------------------------------------------------------------------------------------------------------


def _stock(x, weight, bias, act, input_act):
    return apply_activation_(act, stock_linear(apply_activation(input_act, x), weight, bias))


def _check(x, weight, bias, act, input_act):
    check_linear("linear", x, weight, bias)
    check_activation("linear", act)
    check_activation("linear", input_act)


def _save(ctx, args, y):
    x, weight, bias, act, input_act = args
    if act != "none":
        raise NotImplementedError("deit_fast.linear: backward wants what goes into the activation: call ops.linear")
    ctx.save_for_backward(x, weight, bias)
    ctx.input_activation = input_act


def _backward(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:3], False]
    found = linear_backward(grad, x, weight, bias, None, None, ctx.input_activation, None, needs)
    return *distribute(found, needs[:3]), None, None


_linear = register(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, str input_activation) -> Tensor",
    check=_check,
    stock=_stock,
    triton=kernels.linear,
    unsupported=lambda x, weight, bias, *_: checks.kernel_products(weight, x, bias),
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=weight.dtype),
    autocast=lambda dtype, x, weight, *rest: (cast(x, dtype), cast(weight, dtype), *rest),
    save=_save,
    backward=_backward,
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    input_activation: str = "none",
) -> Tensor:
    """`activation(input_activation(x) @ weight.T + bias)`: x [..., K], weight [N, K], bias [N] → [..., N].

    activation, input_activation: "none", "gelu" (erf) or "gelu_tanh".
    """
    if x.dtype is not weight.dtype:
        checks.same_dtype("linear", x, weight)
    if activation != "none" and torch.is_grad_enabled():
        # Backward wants the pre-activation, which the fused epilogue never writes.
        check_activation("linear", activation)
        return apply_activation(activation, _linear(x, weight, bias, "none", input_activation))
    return _linear(x, weight, bias, activation, input_activation)


# layer_norm_linear ------------------------------------------------------------------------------------------------


def _stock_layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias, kept, capacity):
    x = drop_path.gather(x, kept, capacity)
    y = stock_linear(stock_layer_norm(x, norm_weight, norm_bias, eps), weight, bias)
    return y if kept is None else drop_path.with_room(y, capacity)


def _check_layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias, kept, capacity):
    op = "layer_norm_linear"
    check_linear(op, x, weight, bias)
    check_norm(op, x, norm_weight, norm_bias)
    drop_path.check_kept(op, x, kept)
    drop_path.check_capacity(op, x, kept, capacity)


def _fake_layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias, kept, capacity):
    leading = x.shape[:-1] if kept is None else (capacity, *x.shape[1:-1])
    return x.new_empty((*leading, weight.shape[0]), dtype=weight.dtype)


def _save_layer_norm_linear(ctx, args, y):
    x, norm_weight, norm_bias, eps, weight, bias, kept, _ = args
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, kept)
    ctx.eps = eps


def _backward_layer_norm_linear(ctx, grad, residual_grad=None):
    x, norm_weight, norm_bias, weight, bias, kept = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = [*wanted[:3], *wanted[4:6]]
    found = layer_norm_linear_backward(
        x, norm_weight, norm_bias, ctx.eps, [grad], [weight], [bias], kept, residual_grad, needs
    )
    dx, dnorm_weight, dnorm_bias, dweight, dbias = distribute(found, needs)
    return dx, dnorm_weight, dnorm_bias, None, dweight, dbias, None, None


def check_packed_qkv(op: str, x: Tensor, norm_weight, norm_bias, weight: Tensor, bias: Tensor | None) -> None:
    check_linear(op, x, weight, bias)
    check_norm(op, x, norm_weight, norm_bias)
    if weight.shape[0] % 3:
        raise ValueError(f"deit_fast.{op}: weight must be that of q, k and v, one below the other; has {weight.shape}")


def autocast_layer_norm_linear(dtype, x, norm_weight, norm_bias, eps, weight, *rest) -> tuple:
    return x, norm_weight, norm_bias, eps, cast(weight, dtype), *rest


_layer_norm_linear = register(
    "layer_norm_linear",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor? bias, "
    "Tensor? kept, SymInt? capacity) -> Tensor",
    check=_check_layer_norm_linear,
    stock=_stock_layer_norm_linear,
    triton=kernels.layer_norm_linear,
    unsupported=lambda x, norm_weight, norm_bias, eps, weight, bias, *_: checks.kernel_products(
        weight, x, norm_weight, norm_bias, bias
    ),
    fake=_fake_layer_norm_linear,
    autocast=autocast_layer_norm_linear,
    save=_save_layer_norm_linear,
    backward=_backward_layer_norm_linear,
)


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    capacity: int | None = None,
) -> Tensor:
    """`LayerNorm(x) @ weight.T + bias`; the normalised rows never reach memory.

    x [..., K], norm_weight and norm_bias [K], weight [N, K], bias [N] → [..., N] in the weight's dtype.

    With `kept` (`keep_samples`) for the kept samples of x [B, ...] alone: packed, with room for `capacity` samples
    (by default for all where the count must not be read).
    """
    if x.dtype is not weight.dtype:
        checks.same_dtype("layer_norm_linear", x, weight)
    if kept is not None and capacity is None:
        capacity = drop_path.capacity(kept)
    return _layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias, kept, capacity)


def layer_norm_linear_branching(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer_norm_linear` at the start of a branch, and x for the residual that goes past it.

    The residual's gradient is added to the branch's as LayerNorm's backward writes that, in no pass of its own.
    """
    if x.dtype is not weight.dtype:
        checks.same_dtype("layer_norm_linear", x, weight)
    if kept is not None and capacity is None:
        capacity = drop_path.capacity(kept)
    return _layer_norm_linear.branching(x, norm_weight, norm_bias, eps, weight, bias, kept, capacity)


# layer_norm_qkv ---------------------------------------------------------------------------------------------------


def check_qkv(op: str, x: Tensor, norm_weight, norm_bias, projections: Sequence[Tensor | None]) -> None:
    """projections: weight and bias of q, of k, of v."""
    for i in (0, 2, 4):
        check_linear(op, x, projections[i], projections[i + 1])
        if projections[i].shape != projections[0].shape:
            raise ValueError(f"deit_fast.{op}: q_weight, k_weight and v_weight must have one shape")
    check_norm(op, x, norm_weight, norm_bias)


def autocast_layer_norm_qkv(
    dtype, x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, *rest
) -> tuple:
    q_weight, k_weight, v_weight = (cast(weight, dtype) for weight in (q_weight, k_weight, v_weight))
    return x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, *rest


def qkv_needs(ctx) -> list[bool]:
    """Of (x, norm_weight, norm_bias, eps, then weight and bias of q, of k, of v): as backward operators order them."""
    wanted = ctx.needs_input_grad
    return [*wanted[:3], *wanted[4:10:2], *wanted[5:10:2]]


def qkv_gradients(ordered: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """And back."""
    dx, dnorm_weight, dnorm_bias, *rest = ordered
    interleaved = (gradient for pair in zip(rest[:3], rest[3:], strict=True) for gradient in pair)
    return dx, dnorm_weight, dnorm_bias, None, *interleaved


def stock_layer_norm_qkv(x, norm_weight, norm_bias, eps, *projections):
    normalised = as_dtype(stock_layer_norm(x, norm_weight, norm_bias, eps), product_dtype(projections[0]))
    return tuple(stock_linear(normalised, projections[i], projections[i + 1]) for i in (0, 2, 4))


def _check_layer_norm_qkv(x, norm_weight, norm_bias, eps, *projections):
    check_qkv("layer_norm_qkv", x, norm_weight, norm_bias, projections)


def _fake_layer_norm_qkv(x, norm_weight, norm_bias, eps, q_weight, *_):
    shape = (*x.shape[:-1], q_weight.shape[0])
    return tuple(x.new_empty(shape, dtype=q_weight.dtype) for _ in range(3))


def _save_layer_norm_qkv(ctx, args, outputs):
    x, norm_weight, norm_bias, eps, *projections = args
    ctx.save_for_backward(x, norm_weight, norm_bias, *projections)
    ctx.eps = eps


def _backward_layer_norm_qkv(ctx, of_q, of_k, of_v, residual_grad=None):
    x, norm_weight, norm_bias, *projections = ctx.saved_tensors
    weights, biases = projections[0::2], projections[1::2]
    needs = qkv_needs(ctx)
    shape = (*x.shape[:-1], weights[0].shape[0])
    grads = [weights[0].new_zeros(shape) if grad is None else grad for grad in (of_q, of_k, of_v)]
    found = layer_norm_linear_backward(
        x, norm_weight, norm_bias, ctx.eps, grads, weights, biases, None, residual_grad, needs
    )
    return qkv_gradients(distribute(found, needs))


_layer_norm_qkv = register(
    "layer_norm_qkv",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor q_weight, Tensor? q_bias, "
    "Tensor k_weight, Tensor? k_bias, Tensor v_weight, Tensor? v_bias) -> (Tensor, Tensor, Tensor)",
    check=_check_layer_norm_qkv,
    stock=stock_layer_norm_qkv,
    triton=kernels.layer_norm_qkv,
    unsupported=lambda x, norm_weight, norm_bias, eps, *projections: (
        launch.no_separate_projections(projections[0])
        or checks.kernel_products(*projections, x, norm_weight, norm_bias)
    ),
    fake=_fake_layer_norm_qkv,
    autocast=autocast_layer_norm_qkv,
    save=_save_layer_norm_qkv,
    backward=_backward_layer_norm_qkv,
)


def layer_norm_qkv(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm and three projections kept as separate parameters, in one launch (transformers' layout).

    x [..., K], each weight [N, K] and bias [N] → q, k, v, each [..., N].
    """
    if x.dtype is not q_weight.dtype:
        checks.same_dtype("layer_norm_qkv", x, q_weight)
    return _layer_norm_qkv(x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias)


def layer_norm_qkv_branching(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, *projections: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`layer_norm_qkv` at the start of a branch (`layer_norm_linear_branching`): q, k, v and x.

    projections: weight and bias of q, of k, of v.
    """
    if x.dtype is not projections[0].dtype:
        checks.same_dtype("layer_norm_qkv", x, projections[0])
    return _layer_norm_qkv.branching(x, norm_weight, norm_bias, eps, *projections)


# linear_residual --------------------------------------------------------------------------------------------------


def _stock_linear_residual(x, weight, bias, residual, layer_scale, drop_path_scale, input_act, kept):
    x = drop_path.filled(x, kept)
    branch = stock_linear(apply_activation(input_act, x), weight, bias)
    return stock_residual(branch, residual, layer_scale, drop_path_scale, kept)


def _check_linear_residual(x, weight, bias, residual, layer_scale, drop_path_scale, input_act, kept):
    op = "linear_residual"
    check_linear(op, x, weight, bias)
    check_residual(op, residual, (*x.shape[:-1], weight.shape[0]), layer_scale, drop_path_scale, kept)
    checks.same_device(op, x, residual=residual)
    check_activation(op, input_act)


def _save_linear_residual(ctx, args, y):
    x, weight, bias, residual, layer_scale, drop_path_scale, input_act, kept = args
    ctx.save_for_backward(x, weight, bias, layer_scale, drop_path_scale, kept)
    ctx.input_activation = input_act
    ctx.residual_dtype = residual.dtype


def _backward_linear_residual(ctx, grad):
    x, weight, bias, layer_scale, drop_path_scale, kept = ctx.saved_tensors
    need_x, need_weight, need_bias, need_residual, need_layer_scale, *_ = ctx.needs_input_grad
    needs = [need_x, need_weight, need_bias, need_layer_scale]
    found = linear_backward(grad, x, weight, bias, layer_scale, drop_path_scale, ctx.input_activation, kept, needs)
    dx, dweight, dbias, dlayer_scale = distribute(found, needs)
    dresidual = as_dtype(grad, ctx.residual_dtype) if need_residual else None
    return dx, dweight, dbias, dresidual, dlayer_scale, None, None, None


_linear_residual = register(
    "linear_residual",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? layer_scale, Tensor? drop_path_scale, "
    "str input_activation, Tensor? kept) -> Tensor",
    check=_check_linear_residual,
    stock=_stock_linear_residual,
    triton=kernels.linear_residual,
    unsupported=lambda x, weight, bias, residual, layer_scale, drop_path_scale, *_: checks.kernel_products(
        weight, x, bias, residual, layer_scale, drop_path_scale
    ),
    fake=lambda x, weight, bias, residual, layer_scale, *_: residual.new_empty(
        residual.shape, dtype=residual_dtype(residual, weight, layer_scale)
    ),
    autocast=lambda dtype, x, weight, *rest: (cast(x, dtype), cast(weight, dtype), *rest),
    save=_save_linear_residual,
    backward=_backward_linear_residual,
)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    input_activation: str = "none",
    kept: Tensor | None = None,
) -> Tensor:
    """`residual + drop_path_scale * layer_scale * (input_activation(x) @ weight.T + bias)`.

    x [B, ..., K], weight [N, K], bias and layer_scale [N], residual [B, ..., N], drop_path_scale [B]: one factor
    a sample, taken as data (it has no gradient). The result has the promoted dtype of residual, weight and layer_scale.

    With `kept` (`keep_samples`) x is packed; the dropped samples of the residual are copied.
    """
    if x.dtype is not weight.dtype:
        checks.same_dtype("linear_residual", x, weight)
    return _linear_residual(x, weight, bias, residual, layer_scale, drop_path_scale, input_activation, kept)
