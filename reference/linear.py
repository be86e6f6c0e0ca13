"""The GEMM family: a linear layer with what a transformer block does before and after it."""

from torch import Tensor

from reference.activation import activate
from reference.layer_norm import layer_norm


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(x Wᵀ + bias).

    x: [..., K]; weight W: [M, K]; bias: [M] or None; result: [..., M].
    """
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    return activate(y, activation)


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(LN(x) Wᵀ + bias); x: [..., K], weight W: [M, K], result: [..., M]."""
    return linear(layer_norm(x, norm_weight, norm_bias, eps), weight, bias, activation)


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
    """Queries, keys and values of LN(x) by three separate projections, each [B, N, D] (ViT, equation 5)."""
    y = layer_norm(x, norm_weight, norm_bias, eps)
    return linear(y, q_weight, q_bias), linear(y, k_weight, k_bias), linear(y, v_weight, v_bias)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> Tensor:
    """residual + s_b · γ · (x Wᵀ + bias): the end of a residual branch.

    γ is LayerScale (arXiv 2103.17239, section 2: a learnt diagonal matrix on the branch) and s_b drop path's
    factor for sample b (see `drop_path_scale`).

    x: [B, N, K]; weight W: [D, K]; residual: [B, N, D]; layer_scale γ: [D]; drop_path_scale s: [B]; result:
    [B, N, D].
    """
    y = linear(x, weight, bias)
    if layer_scale is not None:
        y = y * layer_scale
    if drop_path_scale is not None:
        y = y * drop_path_scale.reshape((-1,) + (1,) * (y.ndim - 1))
    return residual + y
