"""The whole MLP half of a block: LayerNorm, FC1, GELU, FC2, LayerScale, drop path, residual."""

import torch
from torch import Tensor

from deit_fast.kernels import mlp as kernels
from deit_fast.ops import activation, checks, drop_path
from deit_fast.ops.layer_norm import stock_layer_norm
from deit_fast.ops.linear import (
    check_linear,
    check_norm,
    check_residual,
    residual_dtype,
    stock_linear,
    stock_residual,
)
from deit_fast.ops.linear_backward import layer_norm_linear_backward, linear_backward
from deit_fast.ops.registration import cast, distribute, register


def _stock(x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, scale, act, kept):
    hidden = stock_linear(
        stock_layer_norm(drop_path.gather(x, kept, x.shape[0]), norm_weight, norm_bias, eps), fc1_weight, fc1_bias
    )
    hidden = activation.apply_(act, hidden)
    branch = stock_linear(hidden, fc2_weight, fc2_bias)
    del hidden  # large, and the allocator can give it to the next
    return stock_residual(branch, x, layer_scale, scale, kept)


def _check(x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, scale, act, kept):
    op = "mlp"
    check_linear(op, x, fc1_weight, fc1_bias)
    check_norm(op, x, norm_weight, norm_bias)
    checks.matrix(op, "fc2_weight", fc2_weight, fc1_weight.shape[0])
    checks.vector(op, "fc2_bias", fc2_bias, fc2_weight.shape[0])
    checks.same_device(op, x, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
    check_residual(op, x, (*x.shape[:-1], fc2_weight.shape[0]), layer_scale, scale, kept)
    activation.check(op, act)


def _save(ctx, args, y):
    x, norm_weight, norm_bias, eps, *rest, act, kept = args
    ctx.save_for_backward(x, norm_weight, norm_bias, *rest, kept)
    ctx.eps, ctx.activation = eps, act


def _backward(ctx, grad):
    """The hidden layer was not kept: it is computed once more, then the two halves' backwards run as ever."""
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, scale, kept = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    need_x, need_norm_weight, need_norm_bias, _, need_fc1, need_fc1_bias, *need_fc2 = wanted
    inner = any((need_x, need_norm_weight, need_norm_bias, need_fc1, need_fc1_bias))
    capacity = None if kept is None else drop_path.capacity(kept)
    hidden = torch.ops.deit_fast.layer_norm_linear(
        x, norm_weight, norm_bias, ctx.eps, fc1_weight, fc1_bias, kept, capacity
    )
    needs = [inner, *need_fc2[:3]]
    found = linear_backward(grad, hidden, fc2_weight, fc2_bias, layer_scale, scale, ctx.activation, kept, needs)
    of_hidden, *of_fc2 = distribute(found, needs)
    of_fc1 = [None] * 5
    if inner:
        needs = [need_x, need_norm_weight, need_norm_bias, need_fc1, need_fc1_bias]
        found = layer_norm_linear_backward(
            x, norm_weight, norm_bias, ctx.eps, [of_hidden], [fc1_weight], [fc1_bias], kept, grad, needs
        )
        of_fc1 = distribute(found, needs)
    return *of_fc1[:3], None, *of_fc1[3:], *of_fc2, None, None, None


_mlp = register(
    "mlp",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor fc1_weight, Tensor? fc1_bias, "
    "Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale, Tensor? drop_path_scale, str activation, "
    "Tensor? kept) -> Tensor",
    check=_check,
    stock=_stock,
    triton=kernels.mlp,
    unsupported=lambda x, norm_weight, norm_bias, eps, *rest: checks.kernel_products(
        *rest[:-2], x, norm_weight, norm_bias
    ),
    fake=lambda x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, *_: (
        x.new_empty(x.shape, dtype=residual_dtype(x, fc2_weight, layer_scale))
    ),
    autocast=lambda dtype, x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, *rest: (
        x,
        norm_weight,
        norm_bias,
        eps,
        cast(fc1_weight, dtype),
        fc1_bias,
        cast(fc2_weight, dtype),
        *rest,
    ),
    save=_save,
    backward=_backward,
    own_backward=True,
)


def mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    activation: str = "gelu",
    kept: Tensor | None = None,
) -> Tensor:
    """`x + drop_path_scale * layer_scale * (act(LayerNorm(x) @ fc1.T + b1) @ fc2.T + b2)` with x [B, ..., D].

    fc1_weight [hidden, D], fc2_weight [D, hidden]. One kernel where the width fits on chip
    (`kernels.mlp.fits`): the hidden layer then never reaches memory. Elsewhere two launches.
    With `kept` (`keep_samples`) only the kept samples are computed.
    """
    if x.dtype is not fc1_weight.dtype:
        checks.same_dtype("mlp", x, fc1_weight)
    return _mlp(
        x,
        norm_weight,
        norm_bias,
        eps,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        layer_scale,
        drop_path_scale,
        activation,
        kept,
    )
