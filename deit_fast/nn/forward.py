"""The forward of each module on the operators, to be taken where its guard (`guards`) is None.

They read timm's attribute names, so they serve `deit_fast.nn` and the swapped modules of timm alike.
"""

from typing import Any

from torch import Tensor

from deit_fast import ops
from deit_fast.nn import parts
from deit_fast.nn.branches import attention_residual, mlp_residual
from deit_fast.nn.drop_path import drop_path_of
from deit_fast.nn.guards import softmax_scale
from deit_fast.nn.layer_scale import gamma_of
from deit_fast.nn.options import memory_of
from deit_fast.nn.parts import Part


def layer_norm_forward(norm: Part, x: Tensor) -> Tensor:
    """LayerNorm over the last dimension: x [..., D] → [..., D]."""
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def attention_forward(attn: Part, x: Tensor) -> Tensor:
    """QKV projection, attention, output projection: x [B, N, D] → [B, N, D]."""
    modules = attn._modules
    qkv, proj = modules["qkv"], modules["proj"]
    out = ops.attend((ops.linear(x, qkv.weight, qkv.bias),), attn.num_heads, softmax_scale(attn))
    return ops.linear(out, proj.weight, proj.bias)


def mlp_forward(mlp: Part, x: Tensor) -> Tensor:
    """FC1, GELU, FC2: x [..., D] → [..., D_out]."""
    modules = mlp._modules
    activation: Any = parts.gelu_name(modules["act"])  # a name: the guard has asked
    return mlp_linears(x, modules["fc1"], modules["fc2"], activation)


def mlp_linears(x: Tensor, fc1: Part, fc2: Part, activation: str) -> Tensor:
    """FC1, GELU, FC2: x [..., D] → [..., D_out]; activation: "gelu" or "gelu_tanh".

    GELU is in the epilogue of FC1 where backward will not want what goes into it.
    """
    hidden = ops.linear(x, fc1.weight, fc1.bias, activation)
    return ops.linear(hidden, fc2.weight, fc2.bias)


def block_forward(block: Part, x: Tensor, readout_rows: int = 0) -> Tensor:
    """A pre-norm transformer block, x [B, N, D] → [B, N, D], in five operator calls.

    Without gradients in four where the MLP is one operator. readout_rows: R > 0 gives the first R rows alone,
    [B, R, D].
    """
    modules = block._modules
    gammas = gamma_of(modules.get("ls1")), gamma_of(modules.get("ls2"))
    drop_paths = modules.get("drop_path1"), modules.get("drop_path2")
    return both_branches(block, x, gammas, drop_paths, readout_rows)


def both_branches(
    block: Part,
    x: Tensor,
    gammas: tuple[Tensor | None, Tensor | None],
    drop_paths: tuple[Part | None, Part | None],
    readout_rows: int,
) -> Tensor:
    """`block_forward` with each branch's LayerScale factors [D] and drop path, wherever the block keeps them."""
    modules = block._modules
    attn, mlp = modules["attn"], modules["mlp"]._modules
    qkv, proj, fc1, fc2 = attn._modules["qkv"], attn._modules["proj"], mlp["fc1"], mlp["fc2"]
    # A few rows are not worth gathering.
    gather = not readout_rows

    draw = drop_path_of(block, 0, drop_paths[0], x, proj, gammas[0], gather)
    x = attention_residual(
        x, modules["norm1"], (qkv,), proj, attn.num_heads, softmax_scale(attn), gammas[0], draw, readout_rows
    )

    draw = drop_path_of(block, 1, drop_paths[1], x, fc2, gammas[1], gather)
    activation: Any = parts.gelu_name(mlp["act"])  # a name: the guard has asked
    return mlp_residual(x, modules["norm2"], fc1, fc2, gammas[1], draw, activation, memory_of(block))


def patch_embed_forward(
    patch_embed: Part,
    images: Tensor,
    *,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    dist_token: Tensor | None = None,
    mask_token: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Images [B, C, H, W] → tokens [B, R + P, D], prefix tokens and positions included (`ops.patch_embed`)."""
    projection = patch_embed._modules["proj"]
    return ops.patch_embed(
        images, projection.weight, projection.bias, pos_embed, cls_token, dist_token, mask_token, mask
    )
