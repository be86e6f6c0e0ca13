"""torch's own LayerNorm, which every library's models use somewhere."""

import torch
from torch import Tensor, nn

from deit_fast.nn import guards, parts
from deit_fast.nn.forward import layer_norm_forward
from deit_fast.swap.rules import register, stock_method, stock_wanted


class LayerNorm(nn.LayerNorm):
    _stock_forward = stock_method(nn.LayerNorm.forward)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._stock_forward(input)
        elif not isinstance(self, LayerNorm):
            return type(self).forward(self, input)
        elif stock_wanted(input) or guards.layer_norm_unfusable(self) is not None:
            return self._stock_forward(input)
        else:
            return layer_norm_forward(self, input)


parts.LAYER_NORMS.add(LayerNorm)
register(nn.LayerNorm, LayerNorm, guards.layer_norm_unfusable)
