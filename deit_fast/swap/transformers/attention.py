"""DeiTAttention and ViTAttention."""

import inspect
from collections.abc import Callable, Collection
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

from deit_fast import ops
from deit_fast.nn import code, parts
from deit_fast.nn.parts import Part
from deit_fast.swap.rules import Method, register, stock_wanted

_LIBRARIES: dict[type[Module], ModuleType] = {
    modeling_deit.DeiTAttention: modeling_deit,
    modeling_vit.ViTAttention: modeling_vit,
}
# Softmax attention over all tokens, whichever backend computes it; another name may mean anything.
_SOFTMAX_ATTENTIONS = [
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
]


def keywords_read(function: Any, seen: set[Any]) -> set[str]:
    """The keyword arguments that change what `function` computes, as its code reads them.

    Those are its parameters, the names that it looks up among the others, and what the functions read to which it may
    hand the others down.
    """
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) or function in seen:
        return set()
    seen.add(function)
    parameters = inspect.signature(function).parameters.values()
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        return {parameter.name for parameter in parameters}
    read = {parameter.name for parameter in parameters}
    read |= {each for each in function.__code__.co_consts if isinstance(each, str) and each.isidentifier()}
    for name in function.__code__.co_names:
        read |= keywords_read(function.__globals__.get(name), seen)
    return read


# The functions that transformers wrote for these names, and the keywords that each reads.
_READ: dict[Callable | None, set[str]] = {
    function: keywords_read(function, set())
    for function in (
        *(ALL_ATTENTION_FUNCTIONS.get(name) for name in _SOFTMAX_ATTENTIONS),
        *(library.eager_attention_forward for library in _LIBRARIES.values()),
    )
    if function is not None and code.written_by(function, "transformers")
}


def add_softmax_attention(name: str, function: Callable, read: set[str]) -> None:
    """Another name for softmax attention, whose function reads these keywords."""
    _SOFTMAX_ATTENTIONS.append(name)
    _READ[function] = read


def changing(kwargs: dict[str, Any], read: Collection[str]) -> str | None:
    """Which of these keywords changes what is computed, where those in `read` can, or None."""
    asked = (name for name, value in kwargs.items() if value is not None and value is not False)
    return next((name for name in asked if name in read), None)


def _function_of(attention: Part) -> Callable | None:
    """What stock would compute attention with."""
    name = attention.config._attn_implementation
    if name == "eager":
        return _LIBRARIES[attention._deit_fast_stock].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get(name) if name in _SOFTMAX_ATTENTIONS else None


def call_unfusable(attention: Part, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
    """Why a call with these arguments is not plain attention, or None."""
    if attention_mask is not None:
        return "is called with an attention mask"
    name = changing(kwargs, _READ.get(_function_of(attention), ())) if kwargs else None
    return None if name is None else f"is called with {name}"


def projections_unfusable(attention: Part) -> str | None:
    modules = attention._modules
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        reason = parts.unfusable(modules[name], parts.LINEARS)
        if reason is not None:
            return f"{name} {reason}"
    if attention.training and attention.attention_dropout > 0.0:
        return "attention dropout is active"
    if attention.is_causal:
        return "is causal"
    if _function_of(attention) not in _READ:
        return f"its attention implementation is {attention.config._attn_implementation!r}"
    width, *others = map(parts.out_features, projections_of(attention))
    if width is not None and (width % attention.head_dim or others != [width, width]):
        return "its heads are not what its projections give"
    if getattr(attention, "num_key_value_groups", 1) != 1:
        return "groups its heads"
    if not isinstance(attention.scaling, (float, int)):
        return "its scaling is no plain number"
    return None


def attention_unfusable(attention: Part) -> str | None:
    reason = projections_unfusable(attention)
    if reason is None and attention.config._attn_implementation == "eager":
        return "eager attention returns its weights"
    return reason


def projections_of(attention: Part) -> tuple[Part, Part, Part]:
    """Of queries, keys and values."""
    modules = attention._modules
    return modules["q_proj"], modules["k_proj"], modules["v_proj"]


def heads_of(attention: Part) -> int:
    """As many as its projections give: `num_attention_heads` is not read when it is called."""
    return attention._modules["q_proj"].weight.shape[0] // attention.head_dim


def _call(attention: Part, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> str | None:
    return (
        stock_wanted(hidden_states)
        or attention_unfusable(attention)
        or call_unfusable(attention, attention_mask, kwargs)
    )


def _forward(attention: Part, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    projected = [ops.linear(hidden_states, each.weight, each.bias) for each in projections_of(attention)]
    out = ops.attend(projected, heads_of(attention), attention.scaling)
    out_proj = attention._modules["o_proj"]
    return ops.linear(out, out_proj.weight, out_proj.bias), None


ATTENTIONS: parts.Classes = {}

for _stock in _LIBRARIES:
    _swapped = register(_stock, attention_unfusable, {"forward": Method(_call, _forward)})
    parts.add(ATTENTIONS, _swapped, stock=_stock)
