"""LayerScale with timm's constructor and parameter name."""

import torch
from torch import Tensor, nn

from deit_fast.nn import parts
from deit_fast.nn.parts import Part


class LayerScale(nn.Module):
    """`x * gamma` over x [..., dim], one learned factor a channel (Touvron et al. 2021, 'Going deeper', equation 6)."""

    def __init__(
        self,
        dim: int,
        init_values: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


parts.add(parts.LAYER_SCALES, LayerScale)


def gamma_of(layer_scale: Part | None) -> Tensor | None:
    """A branch's LayerScale factors [D]; None where nothing or an identity stands in its place."""
    return None if layer_scale is None or type(layer_scale) in parts.IDENTITIES else layer_scale.gamma
