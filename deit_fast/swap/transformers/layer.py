"""DeiTLayer and ViTLayer."""

from typing import Any

from torch import Tensor
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

from deit_fast.nn import guards, parts
from deit_fast.nn.branches import attention_residual, mlp_residual
from deit_fast.nn.drop_path import NO_DROP_PATH
from deit_fast.nn.options import memory_of
from deit_fast.nn.parts import Part
from deit_fast.nn.readout import rows_read
from deit_fast.swap.rules import Method, register, stock_wanted
from deit_fast.swap.transformers.attention import (
    ATTENTIONS,
    call_unfusable,
    heads_of,
    projections_of,
    projections_unfusable,
)
from deit_fast.swap.transformers.mlp import MLPS, gelu_name, mlp_unfusable
from deit_fast.swap.transformers.recording import touched

_PARTS = (("layernorm_before", parts.LAYER_NORMS), ("layernorm_after", parts.LAYER_NORMS), ("mlp", MLPS))


def layer_unfusable(layer: Part) -> str | None:
    modules = layer._modules
    for name, classes in _PARTS:
        reason = parts.unfusable(modules[name], classes)
        if reason is not None:
            return f"{name} {reason}"
    for name in ("layernorm_before", "layernorm_after"):
        reason = guards.layer_norm_unfusable(modules[name])
        if reason is not None:
            return f"{name} {reason}"
    attention = modules["attention"]
    reason = touched(attention, ATTENTIONS, "attentions")
    if reason is not None:
        return f"attention {reason}"
    reason = projections_unfusable(attention)
    if reason is not None:
        return f"attention: {reason}"
    reason = mlp_unfusable(modules["mlp"])
    if reason is not None:
        return f"mlp: {reason}"
    if not parts.idle_dropout(modules["dropout"]):
        return "dropout is active"
    return None


def last_layer_unfusable(layer: Part) -> str | None:
    if type(layer) not in LAYERS:
        return f"the last layer is a {parts.class_name(layer)}"
    if layer.gradient_checkpointing and layer.training:
        return "the last layer is checkpointed"
    reason = touched(layer, LAYERS, "hidden_states")
    if reason is not None:
        return f"the last layer {reason}"
    reason = layer_unfusable(layer)
    return None if reason is None else f"the last layer: {reason}"


def _readout_rows(layer: Part) -> int:
    """How many rows of this call's result are read; 0 for all."""
    rows = rows_read(layer)
    return rows if rows and touched(layer, LAYERS, "hidden_states") is None else 0


def _layer_forward(layer: Part, x: Tensor, readout_rows: int) -> Tensor:
    modules = layer._modules
    attention, mlp = modules["attention"], modules["mlp"]._modules
    x = attention_residual(
        x,
        modules["layernorm_before"],
        projections_of(attention),
        attention._modules["o_proj"],
        heads_of(attention),
        attention.scaling,
        None,
        NO_DROP_PATH,
        readout_rows,
    )
    activation: Any = gelu_name(mlp["activation_fn"])  # a name: the guard has asked
    norm = modules["layernorm_after"]
    return mlp_residual(x, norm, mlp["fc1"], mlp["fc2"], None, NO_DROP_PATH, activation, memory_of(layer))


def _call(layer: Part, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> str | None:
    return (
        stock_wanted(hidden_states)
        or layer_unfusable(layer)
        or call_unfusable(layer._modules["attention"], attention_mask, kwargs)
    )


def _forward(layer: Part, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _layer_forward(layer, hidden_states, _readout_rows(layer))


LAYERS: parts.Classes = {}

for _stock in (modeling_deit.DeiTLayer, modeling_vit.ViTLayer):
    # readout_rows: set where a classifier reads no more of its last layer (`nn.readout.reading`).
    _swapped = register(_stock, layer_unfusable, {"forward": Method(_call, _forward)}, readout_rows=None)
    parts.add(LAYERS, _swapped, stock=_stock)
