"""The GEMM family: a linear layer with what surrounds it in a transformer block fused into it.

Arithmetic runs in the weight's dtype. The input, the residual and the biases may be wider: that is what autocast
hands over (float32 stream, 16-bit weights).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import linear as kernels
from deit_fast.ops import activation, checks
from deit_fast.ops.layer_norm import stock_layer_norm
from deit_fast.ops.registration import cast, register


def stock_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = weight.dtype
    if x.dtype != dtype:
        x = x.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    return F.linear(x, weight, bias)


def stock_residual(
    branch: Tensor, residual: Tensor, layer_scale: Tensor | None, drop_path_scale: Tensor | None
) -> Tensor:
    if layer_scale is not None:
        branch = branch * layer_scale
    if drop_path_scale is not None:
        branch = branch * drop_path_scale.view(-1, *[1] * (branch.ndim - 1))
    return residual + branch


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
    op: str, residual: Tensor, shape: tuple, layer_scale: Tensor | None, drop_path_scale: Tensor | None
) -> None:
    if residual.shape != shape:
        raise ValueError(
            f"deit_fast.{op}: residual must have the output's shape {tuple(shape)}, got {tuple(residual.shape)}"
        )
    checks.vector(op, "layer_scale", layer_scale, shape[-1])
    checks.vector(op, "drop_path_scale", drop_path_scale, shape[0])
    checks.same_device(op, residual, layer_scale=layer_scale, drop_path_scale=drop_path_scale)


# linear -----------------------------------------------------------------------------------------------------------


def _stock(x, weight, bias, act, input_act):
    return activation.apply(act, stock_linear(activation.apply(input_act, x), weight, bias))


def _check(x, weight, bias, act, input_act):
    check_linear("linear", x, weight, bias)
    activation.check("linear", act)
    activation.check("linear", input_act)


_linear = register(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, str input_activation) -> Tensor",
    check=_check,
    stock=_stock,
    triton=kernels.linear,
    unsupported=lambda x, weight, bias, *_: checks.kernel_dtypes(x, weight, bias),
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=weight.dtype),
    autocast=lambda dtype, x, weight, *rest: (cast(x, dtype), cast(weight, dtype), *rest),
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
    return _linear(x, weight, bias, activation, input_activation)


# layer_norm_linear ------------------------------------------------------------------------------------------------


def _stock_layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias):
    return stock_linear(stock_layer_norm(x, norm_weight, norm_bias, eps), weight, bias)


def _check_layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias):
    check_linear("layer_norm_linear", x, weight, bias)
    check_norm("layer_norm_linear", x, norm_weight, norm_bias)


_layer_norm_linear = register(
    "layer_norm_linear",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor? bias) -> Tensor",
    check=_check_layer_norm_linear,
    stock=_stock_layer_norm_linear,
    triton=kernels.layer_norm_linear,
    unsupported=lambda x, norm_weight, norm_bias, eps, weight, bias: checks.kernel_dtypes(
        x, norm_weight, norm_bias, weight, bias
    ),
    fake=lambda x, norm_weight, norm_bias, eps, weight, bias: x.new_empty(
        (*x.shape[:-1], weight.shape[0]), dtype=weight.dtype
    ),
    autocast=lambda dtype, x, norm_weight, norm_bias, eps, weight, bias: (
        x,
        norm_weight,
        norm_bias,
        eps,
        cast(weight, dtype),
        bias,
    ),
)


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """`LayerNorm(x) @ weight.T + bias`; the normalised rows never reach memory.

    x [..., K], norm_weight and norm_bias [K], weight [N, K], bias [N] → [..., N] in the weight's dtype.
    """
    if x.dtype is not weight.dtype:
        checks.same_dtype("layer_norm_linear", x, weight)
    return _layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias)


# layer_norm_qkv ---------------------------------------------------------------------------------------------------


def _stock_layer_norm_qkv(x, norm_weight, norm_bias, eps, *projections):
    normalised = stock_layer_norm(x, norm_weight, norm_bias, eps).to(projections[0].dtype)
    return tuple(stock_linear(normalised, projections[i], projections[i + 1]) for i in (0, 2, 4))


def _check_layer_norm_qkv(x, norm_weight, norm_bias, eps, *projections):
    op = "layer_norm_qkv"
    for i in (0, 2, 4):
        check_linear(op, x, projections[i], projections[i + 1])
        if projections[i].shape != projections[0].shape:
            raise ValueError(f"{op}: q_weight, k_weight and v_weight must have one shape")
    check_norm(op, x, norm_weight, norm_bias)


def _fake_layer_norm_qkv(x, norm_weight, norm_bias, eps, q_weight, *_):
    shape = (*x.shape[:-1], q_weight.shape[0])
    return tuple(x.new_empty(shape, dtype=q_weight.dtype) for _ in range(3))


_layer_norm_qkv = register(
    "layer_norm_qkv",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor q_weight, Tensor? q_bias, "
    "Tensor k_weight, Tensor? k_bias, Tensor v_weight, Tensor? v_bias) -> (Tensor, Tensor, Tensor)",
    check=_check_layer_norm_qkv,
    stock=_stock_layer_norm_qkv,
    triton=kernels.layer_norm_qkv,
    unsupported=lambda x, norm_weight, norm_bias, eps, *projections: checks.kernel_dtypes(
        x, norm_weight, norm_bias, *projections
    ),
    fake=_fake_layer_norm_qkv,
    autocast=lambda dtype, x, norm_weight, norm_bias, eps, *projections: (
        x,
        norm_weight,
        norm_bias,
        eps,
        *(cast(p, dtype) if i % 2 == 0 else p for i, p in enumerate(projections)),
    ),
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


# linear_residual --------------------------------------------------------------------------------------------------


def _stock_linear_residual(x, weight, bias, residual, layer_scale, drop_path_scale, input_act):
    branch = stock_linear(activation.apply(input_act, x), weight, bias)
    return stock_residual(branch, residual, layer_scale, drop_path_scale)


def _check_linear_residual(x, weight, bias, residual, layer_scale, drop_path_scale, input_act):
    op = "linear_residual"
    check_linear(op, x, weight, bias)
    check_residual(op, residual, (*x.shape[:-1], weight.shape[0]), layer_scale, drop_path_scale)
    checks.same_device(op, x, residual=residual)
    activation.check(op, input_act)


_linear_residual = register(
    "linear_residual",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? layer_scale, Tensor? drop_path_scale, "
    "str input_activation) -> Tensor",
    check=_check_linear_residual,
    stock=_stock_linear_residual,
    triton=kernels.linear_residual,
    unsupported=lambda x, weight, bias, residual, layer_scale, drop_path_scale, _: checks.kernel_dtypes(
        x, weight, bias, residual, layer_scale, drop_path_scale
    ),
    fake=lambda x, weight, bias, residual, layer_scale, *_: residual.new_empty(
        residual.shape, dtype=residual_dtype(residual, weight, layer_scale)
    ),
    autocast=lambda dtype, x, weight, *rest: (cast(x, dtype), cast(weight, dtype), *rest),
)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    input_activation: str = "none",
) -> Tensor:
    """`residual + drop_path_scale * layer_scale * (input_activation(x) @ weight.T + bias)`.

    x [B, ..., K], weight [N, K], bias and layer_scale [N], residual [B, ..., N], drop_path_scale [B]: one factor
    a sample. The result has the promoted dtype of residual, weight and layer_scale.
    """
    if x.dtype is not weight.dtype:
        checks.same_dtype("linear_residual", x, weight)
    return _linear_residual(x, weight, bias, residual, layer_scale, drop_path_scale, input_activation)
