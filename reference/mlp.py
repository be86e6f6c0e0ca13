"""The MLP half of a transformer block, its residual connection included."""

from torch import Tensor

from reference.linear import layer_norm_linear, linear_residual


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
) -> Tensor:
    """x + s_b · γ · (activation(LN(x) W₁ᵀ + b₁) W₂ᵀ + b₂)  (ViT, equation 3, with LayerScale γ and drop path
    s).

    x: [B, N, D]; fc1_weight W₁: [H, D]; fc2_weight W₂: [D, H]; layer_scale γ: [D]; drop_path_scale s: [B];
    result: [B, N, D].
    """
    hidden = layer_norm_linear(x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, activation)
    return linear_residual(hidden, fc2_weight, fc2_bias, x, layer_scale, drop_path_scale)
