"""The first part of a block: LayerNorm, the three projections, attention (ViT, equations 2 and 5 to 8)."""

from torch import Tensor

from reference.attention import attention, attention_qkv
from reference.linear import layer_norm_linear, layer_norm_qkv


def layer_norm_attention(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Attention(LN(x)) before the output projection: x [B, N, D] → [B, N, W], heads side by side.

    weight: [3W, D] and bias: [3W] or None, those of q, k and v one below the other; norm_weight, norm_bias: [D]
    or None.
    """
    qkv = layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias)
    out, _ = attention(qkv.unflatten(-1, (3, num_heads, -1)), scale)
    return out


def layer_norm_attention_qkv(
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
    num_heads: int,
    scale: float,
) -> Tensor:
    """As `layer_norm_attention`, from three weights [W, D] and biases [W] or None."""
    projected = layer_norm_qkv(x, norm_weight, norm_bias, eps, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias)
    out, _ = attention_qkv(*(t.unflatten(-1, (num_heads, -1)) for t in projected), scale)
    return out
