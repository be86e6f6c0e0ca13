"""Multi-head self-attention with timm's constructor and parameter names."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.nn import guards, parts
from deit_fast.nn.forward import attention_forward


class Attention(nn.Module):
    """`proj(attention(qkv(x)))` over x [B, N, dim], packed QKV, no copies between.

    Dropout above 0 is honoured by the stock operators in training.

    Raises:
        ValueError: QK-norm, or a norm or gate on the output, which the kernels do not compute; a head count that does
            not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for option, name in ((qk_norm, "qk_norm"), (scale_norm, "scale_norm"), (gated, "gated")):
            if option:
                raise ValueError(f"deit_fast.nn.Attention does not compute {name}=True; use timm's Attention")
        if attn_head_dim is None:
            if dim % num_heads:
                raise ValueError(f"num_heads must divide dim, got dim={dim} and num_heads={num_heads}")
            attn_head_dim = dim // num_heads
        self.num_heads = num_heads
        self.head_dim = attn_head_dim
        self.attn_dim = num_heads * attn_head_dim
        self.scale = attn_head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is None and not is_causal and guards.attention_unfusable(self) is None:
            return attention_forward(self, x)
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, self.attn_dim)))


parts.add(parts.ATTENTIONS, Attention)
