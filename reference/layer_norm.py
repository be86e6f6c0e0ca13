"""Layer normalization (Ba, Kiros and Hinton, arXiv 1607.06450, equations 3 and 4)."""

from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x − μ) / √(σ² + eps) · weight + bias over the last dimension.

    μ = 1/D Σ x, σ² = 1/D Σ (x − μ)² (the biased variance).

    x: [..., D]; weight, bias: [D] or None (1 and 0).
    """
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    y = centred / (variance + eps).sqrt()
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, LN(s)) with s = x + residual; both results have x's shape [..., D]."""
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)
