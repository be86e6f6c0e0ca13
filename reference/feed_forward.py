"""The MLP half of a transformer block in two halves, with what lies between them, as training computes it."""

from torch import Tensor

from reference.activation import activate
from reference.linear import layer_norm_linear, linear_residual


def layer_norm_fc1(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
) -> tuple[Tensor, Tensor]:
    """h = LN(x) Wᵀ + bias and activation(h): the MLP's first layer as training wants it.

    x: [..., D]; weight W: [H, D]; results: [..., H].
    """
    h = layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias)
    return h, activate(h, activation)


def fc2_residual(
    pre_activation: Tensor,
    activated: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """residual + s_b · γ · (activation(h) Wᵀ + bias), and its gradient by h: the MLP's second layer.

    pre_activation h: [B, N, H]; `activated` is activation(h), for whoever does not compute it anew; weight W: [D, H];
    the rest as of `linear_residual`.
    """
    return linear_residual(activate(pre_activation, activation), weight, bias, residual, layer_scale, drop_path_scale)
