"""DeiTMLP and ViTMLP."""

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import activations
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

from deit_fast.nn import parts
from deit_fast.nn.forward import mlp_linears
from deit_fast.nn.parts import Part
from deit_fast.swap.rules import Mixin, register, stock_wanted


def gelu_name(activation: Part) -> str | None:
    if type(activation) is activations.GELUActivation:
        return "gelu" if activation.act is F.gelu else None
    if type(activation) is activations.GELUTanh:
        return "gelu_tanh" if isinstance(activation.act, functools.partial) else None
    return parts.gelu_name(activation)


def mlp_unfusable(mlp: Part) -> str | None:
    modules = mlp._modules
    for name in ("fc1", "fc2"):
        reason = parts.unfusable(modules[name], parts.LINEARS)
        if reason is not None:
            return f"{name} {reason}"
    activation = modules["activation_fn"]
    if gelu_name(activation) is None:
        return f"its activation is not torch's GELU ({type(activation).__name__})"
    if parts.touched(activation) is not None:
        return f"activation_fn {parts.touched(activation)}"
    return None


class _MLP(Mixin):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not isinstance(self, _MLP):
            return type(self).forward(self, hidden_states)
        if stock_wanted(hidden_states) or mlp_unfusable(self) is not None:
            return super().forward(hidden_states)
        modules = self._modules
        activation: Any = gelu_name(modules["activation_fn"])  # a name: the guard has asked
        return mlp_linears(hidden_states, modules["fc1"], modules["fc2"], activation)


class DeiTMLP(_MLP, modeling_deit.DeiTMLP):
    pass


class ViTMLP(_MLP, modeling_vit.ViTMLP):
    pass


MLPS = {DeiTMLP, ViTMLP}

register(modeling_deit.DeiTMLP, DeiTMLP, mlp_unfusable)
register(modeling_vit.ViTMLP, ViTMLP, mlp_unfusable)
