"""LayerScale (Touvron et al., Going deeper with Image Transformers, arXiv 2103.17239, section 2)."""

from torch import Tensor


def layer_scale(x: Tensor, gamma: Tensor) -> Tensor:
    """diag(γ) x: each channel of a residual branch times its own learnt factor. x: [..., D]; gamma: [D]."""
    return x * gamma
