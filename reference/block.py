"""One pre-norm transformer block (ViT, equations 2 and 3; LayerScale: arXiv 2103.17239, section 2)."""

from collections.abc import Mapping

from torch import Tensor

from reference.attention import attention
from reference.linear import layer_norm_linear, linear_residual
from reference.mlp import mlp


def block(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    num_heads: int,
    eps: float = 1e-6,
    drop_path_scale1: Tensor | None = None,
    drop_path_scale2: Tensor | None = None,
) -> Tensor:
    """x' = x + s₁ γ₁ Attention(LN₁(x)) W_oᵀ,  result = x' + s₂ γ₂ MLP(LN₂(x')).

    x: [B, N, D]; parameters: the block's own part of a state dict in timm's names (`norm1.weight`,
    `attn.qkv.weight`, …; `ls1.gamma` and `ls2.gamma` where there is LayerScale); drop_path_scale1,
    drop_path_scale2: [B], see `drop_path_scale`.
    """
    get = parameters.get
    batch, tokens, width = x.shape
    head_dim = width // num_heads

    qkv = layer_norm_linear(
        x, get("norm1.weight"), get("norm1.bias"), eps, parameters["attn.qkv.weight"], get("attn.qkv.bias")
    )
    out, _ = attention(qkv.reshape(batch, tokens, 3, num_heads, head_dim), head_dim**-0.5)
    x = linear_residual(
        out, parameters["attn.proj.weight"], get("attn.proj.bias"), x, get("ls1.gamma"), drop_path_scale1
    )
    return mlp(
        x,
        get("norm2.weight"),
        get("norm2.bias"),
        eps,
        parameters["mlp.fc1.weight"],
        get("mlp.fc1.bias"),
        parameters["mlp.fc2.weight"],
        get("mlp.fc2.bias"),
        get("ls2.gamma"),
        drop_path_scale2,
    )
