"""torch's own LayerNorm, which every library's models use somewhere."""

from torch import Tensor, nn

from deit_fast.nn import guards, parts
from deit_fast.nn.forward import layer_norm_forward
from deit_fast.nn.parts import Part
from deit_fast.swap.rules import Method, register, stock_wanted


def _call(norm: Part, input: Tensor) -> str | None:
    return stock_wanted(input) or guards.layer_norm_unfusable(norm)


def _forward(norm: Part, input: Tensor) -> Tensor:
    return layer_norm_forward(norm, input)


LayerNorm = register(nn.LayerNorm, guards.layer_norm_unfusable, {"forward": Method(_call, _forward)})
parts.add(parts.LAYER_NORMS, LayerNorm, stock=nn.LayerNorm)
