"""DeiTAttention and ViTAttention."""

from typing import Any

from torch import Tensor
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

from deit_fast import ops
from deit_fast.nn import parts
from deit_fast.nn.branches import attend
from deit_fast.nn.parts import Part
from deit_fast.swap.rules import Mixin, register, stock_wanted

# Softmax attention over all tokens, whichever backend computes it; a name that a user registered may mean anything.
_SOFTMAX_ATTENTIONS = {
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
}
# Keyword arguments that a model hands down to its layers and that change nothing in them.
_HARMLESS = {"output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch"}


def plain_call(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether a call has no mask, and no keyword that changes what is computed."""
    return attention_mask is None and (not kwargs or _HARMLESS.issuperset(kwargs))


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
    implementation = attention.config._attn_implementation
    if implementation not in _SOFTMAX_ATTENTIONS:
        return f"its attention implementation is {implementation!r}"
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


def _attention_forward(attention: Part, x: Tensor) -> tuple[Tensor, None]:
    projected = [ops.linear(x, each.weight, each.bias) for each in projections_of(attention)]
    out = attend(projected, attention.num_attention_heads, attention.scaling)
    out_proj = attention._modules["o_proj"]
    return ops.linear(out, out_proj.weight, out_proj.bias), None


class _Attention(Mixin):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if not isinstance(self, _Attention):
            return type(self).forward(self, hidden_states, attention_mask, **kwargs)
        if (
            not plain_call(attention_mask, kwargs)
            or stock_wanted(hidden_states)
            or attention_unfusable(self) is not None
        ):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return _attention_forward(self, hidden_states)


class DeiTAttention(_Attention, modeling_deit.DeiTAttention):
    pass


class ViTAttention(_Attention, modeling_vit.ViTAttention):
    pass


ATTENTIONS = {DeiTAttention, ViTAttention}

register(modeling_deit.DeiTAttention, DeiTAttention, attention_unfusable)
register(modeling_vit.ViTAttention, ViTAttention, attention_unfusable)
