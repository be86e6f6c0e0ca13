"""What stands between a block's branch and its residual: LayerScale and drop path."""

import torch
from torch import Tensor, nn

from deit_fast.nn import parts


class LayerScale(nn.Module):
    """`x * gamma`, one learned factor a channel (Touvron et al. 2021, 'Going deeper', equation 6)."""

    def __init__(self, dim: int, init_values: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is dropped with `drop_prob`, the rest scaled up.

    The mask is drawn as timm's DropPath draws it, so one seed gives one mask (Huang et al. 2016).
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0 and self.scale_by_keep:
            mask.div_(keep_prob)
        return x * mask

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


parts.LAYER_SCALES.add(LayerScale)
parts.DROP_PATHS.add(DropPath)
