"""LayerNorm with timm's constructor."""

import torch
from torch import Tensor, nn

from deit_fast.nn import guards, parts
from deit_fast.nn.forward import layer_norm_forward


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension of x [..., num_channels]; `eps` 1e-6 and the argument names are timm's."""

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps=eps, elementwise_affine=affine, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if guards.layer_norm_unfusable(self) is not None:
            return super().forward(x)
        return layer_norm_forward(self, x)


parts.add(parts.LAYER_NORMS, LayerNorm)
