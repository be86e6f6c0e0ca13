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
from deit_fast.swap.rules import Method, register, stock_wanted


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
    reason = parts.unfusable(activation, parts.ACTIVATIONS)
    return None if reason is None else f"activation_fn {reason}"


def _call(mlp: Part, hidden_states: Tensor) -> str | None:
    return stock_wanted(hidden_states) or mlp_unfusable(mlp)


def _forward(mlp: Part, hidden_states: Tensor) -> Tensor:
    modules = mlp._modules
    activation: Any = gelu_name(modules["activation_fn"])  # a name: the guard has asked
    return mlp_linears(hidden_states, modules["fc1"], modules["fc2"], activation)


MLPS: parts.Classes = {}

parts.add(parts.ACTIVATIONS, activations.GELUActivation, activations.GELUTanh)
for _stock in (modeling_deit.DeiTMLP, modeling_vit.ViTMLP):
    _swapped = register(_stock, mlp_unfusable, {"forward": Method(_call, _forward)})
    parts.add(MLPS, _swapped, stock=_stock)
