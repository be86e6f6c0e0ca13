"""`attn_implementation="deit_fast"`, for any model of transformers'."""

from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deit_fast import ops
from deit_fast.swap.rules import stock_wanted
from deit_fast.swap.transformers.attention import add_softmax_attention, changing, keywords_read

NAME = "deit_fast"
_READ = keywords_read(sdpa_attention_forward, set())


def attention_forward(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`softmax(scaling * q kᵀ) v`, or all that transformers' "sdpa" computes where a call asks for more.

    query: [B, H, N, d]; key, value: [B, H, M, d]. Returns the output [B, N, H, d], and None for the weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (
        stock_wanted(query) is not None
        or attention_mask is not None
        or dropout
        or causal
        or not isinstance(scale, float | int)
        or not _one_to_one(query, key, value)
        or changing(kwargs, _READ) is not None
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    out, _ = ops.attention([each.transpose(1, 2) for each in (query, key, value)], scale)
    return out.unflatten(-1, (query.shape[1], query.shape[-1])), None


def _one_to_one(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether each head has its own keys and values, of its own width."""
    batch, heads, _, width = query.shape
    return key.shape == value.shape and (key.shape[0], key.shape[1], key.shape[3]) == (batch, heads, width)


AttentionInterface.register(NAME, attention_forward)
# Without a mask function of this name transformers would drop a mask that is given.
AttentionMaskInterface.register(NAME, sdpa_mask)
# Swapped modules take it for what it is.
add_softmax_attention(NAME, attention_forward, _READ)
