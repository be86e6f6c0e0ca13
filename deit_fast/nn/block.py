"""The pre-norm transformer block with timm's constructor and parameter names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deit_fast.nn import guards, parts
from deit_fast.nn.attention import Attention
from deit_fast.nn.drop_path import DropPath
from deit_fast.nn.forward import block_forward
from deit_fast.nn.layer_norm import LayerNorm
from deit_fast.nn.layer_scale import LayerScale
from deit_fast.nn.mlp import Mlp
from deit_fast.nn.options import check_memory


class Block(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))` over x [B, N, dim], LayerScale and drop path on each branch.

    Computed whole, in five operator calls, when all parts are what the kernels compute (fewer at narrow widths without
    gradients); part by part when one is not (a hook on an inner module, active dropout, an attention mask).

    memory: what is kept for backward. "balanced" keeps the block's input, qkv, the attention output, the input of
    the MLP half and its pre-activation; "low" computes the pre-activation again. Neither changes a value.

    Raises:
        ValueError: no such `memory`, or what `attn_layer` or `mlp_layer` refuses.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        mlp_layer: type[nn.Module] = Mlp,
        attn_layer: type[nn.Module] = Attention,
        depth: int = 0,
        memory: str = "balanced",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_memory(memory)
        super().__init__()
        self._deit_fast_memory = memory
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **factory)
        self.attn = attn_layer(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            **factory,
        )
        self.ls1 = LayerScale(dim, init_values, **factory) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = mlp_layer(
            in_features=dim,
            hidden_features=int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
            **factory,
        )
        self.ls2 = LayerScale(dim, init_values, **factory) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is None and not is_causal and guards.block_unfusable(self) is None:
            return block_forward(self, x)
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


parts.add(parts.BLOCKS, Block)
