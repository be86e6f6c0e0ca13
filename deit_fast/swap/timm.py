"""timm: its ViT block with all parts, and the VisionTransformer's embedding, which becomes one operator."""

import inspect

import timm
from timm.models import vision_transformer

# Before anything is imported that newer releases alone have.
if "is_causal" not in inspect.signature(vision_transformer.Block.forward).parameters:
    raise ImportError(
        f'deit_fast.swap needs timm 1.0.31 or newer, found {timm.__version__}: pip install "deit_fast[timm]"'
    )

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, activations
from timm.layers import LayerNorm as StockLayerNorm
from timm.layers import Mlp as StockMlp
from timm.layers import PatchEmbed as StockPatchEmbed
from timm.models import deit
from timm.models._manipulate import checkpoint_seq
from torch import Tensor
from torch.nn import Module

from deit_fast.nn import code, guards, options, parts
from deit_fast.nn.drop_path import can_draw_ahead, drawn_ahead
from deit_fast.nn.forward import (
    attention_forward,
    block_forward,
    layer_norm_forward,
    mlp_forward,
    patch_embed_forward,
)
from deit_fast.nn.parts import Part
from deit_fast.nn.readout import last_block_unfusable, last_norm_unfusable, rows_read
from deit_fast.swap.calls import count
from deit_fast.swap.rules import Method, register, stock_wanted


def layer_norm_unfusable(norm: Part) -> str | None:
    if norm._fast_norm:
        return "timm's fast norm is set"
    return guards.layer_norm_unfusable(norm)


def _of_x(unfusable: Callable[[Part], str | None], fused: Callable[[Part, Tensor], Tensor]) -> dict[str, Method]:
    """A forward that takes x alone."""

    def now(module: Part, x: Tensor) -> str | None:
        return stock_wanted(x) or unfusable(module)

    return {"forward": Method(now, fused)}


def _masked(attn_mask: Tensor | None, is_causal: bool) -> str | None:
    return "is called with an attention mask" if attn_mask is not None or is_causal else None


def _attention_call(attn: Part, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
    return _masked(attn_mask, is_causal) or stock_wanted(x) or guards.attention_unfusable(attn)


def _block_call(block: Part, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
    return _masked(attn_mask, is_causal) or stock_wanted(x) or guards.block_unfusable(block)


def _run_block(block: Part, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    return block_forward(block, x, rows_read(block))


def _run_attention(attn: Part, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    return attention_forward(attn, x)


LayerNorm = register(StockLayerNorm, layer_norm_unfusable, _of_x(layer_norm_unfusable, layer_norm_forward))
Attention = register(
    vision_transformer.Attention,
    guards.attention_unfusable,
    {"forward": Method(_attention_call, _run_attention)},
)
Mlp = register(StockMlp, guards.mlp_unfusable, _of_x(guards.mlp_unfusable, mlp_forward))
Block = register(
    vision_transformer.Block,
    guards.block_unfusable,
    {"forward": Method(_block_call, _run_block)},
    # Set where a model that is not timm's reads no more of the last block (`nn.readout.reading`).
    readout_rows=None,
)

parts.add(parts.LAYER_NORMS, StockLayerNorm)
parts.add(parts.LAYER_NORMS, LayerNorm, stock=StockLayerNorm)
parts.add(parts.ATTENTIONS, Attention, stock=vision_transformer.Attention)
parts.add(parts.MLPS, Mlp, stock=StockMlp)
parts.add(parts.BLOCKS, Block, stock=vision_transformer.Block)
parts.add(parts.LAYER_SCALES, LayerScale)
parts.add(parts.DROP_PATHS, DropPath)
parts.add(parts.ACTIVATIONS, activations.GELU, activations.GELUTanh)
parts.GELUS.update({activations.GELU: "gelu", activations.GELUTanh: "gelu_tanh"})

_REFUSED = "images that the projection refuses"

# Patch embedding --------------------------------------------------------------------------------------------------


def patch_embed_unfusable(patch_embed: Part) -> str | None:
    if not patch_embed.flatten:
        return "gives a grid of patches, not a sequence"
    if patch_embed.dynamic_img_pad:
        return "pads its images"
    return guards.patch_embed_unfusable(patch_embed)


def _projectable(patch_embed: Part, images: Tensor) -> bool:
    """Whether the projection takes images of this dtype and these channels; stock words the errors."""
    weight, _ = parts.weight_and_bias(patch_embed._modules["proj"])
    if images.ndim != 4 or images.shape[1] != weight.shape[1]:
        return False
    if images.dtype is weight.dtype:
        return True
    return images.is_floating_point() and torch.is_autocast_enabled(images.device.type)


def _whole_patches(patch_embed: Part, images: Tensor) -> bool:
    """Whether stock accepts the size of these images and every pixel belongs to a patch."""
    height, width = images.shape[2:]
    if patch_embed.strict_img_size and patch_embed.img_size is not None:
        return (height, width) == tuple(patch_embed.img_size)
    return height % patch_embed.patch_size[0] == 0 and width % patch_embed.patch_size[1] == 0


def _patch_embed_call(patch_embed: Part, x: Tensor) -> str | None:
    reason = stock_wanted(x) or patch_embed_unfusable(patch_embed)
    if reason is not None:
        return reason
    if not _projectable(patch_embed, x):
        return _REFUSED
    return None if _whole_patches(patch_embed, x) else "images of another size, or that leave pixels over"


PatchEmbed = register(
    StockPatchEmbed, patch_embed_unfusable, {"forward": Method(_patch_embed_call, patch_embed_forward)}
)

parts.add(parts.PATCH_EMBEDS, PatchEmbed, stock=StockPatchEmbed)

# The model: its embedding in one operator, then blocks and norm as modules ------------------------------------------


def vision_transformer_unfusable(model: Part) -> str | None:
    modules = model._modules
    patch_embed = modules["patch_embed"]
    reason = parts.unfusable(patch_embed, parts.PATCH_EMBEDS)
    if reason is not None:
        return f"patch_embed {reason}"
    reason = patch_embed_unfusable(patch_embed)
    if reason is not None:
        return f"patch_embed: {reason}"
    if model.dynamic_img_size or patch_embed.img_size is None:
        return "takes images of any size"
    if model.reg_token is not None:
        return "has register tokens"
    if model.grad_checkpointing and vision_transformer.checkpoint_seq is not checkpoint_seq:
        return "timm's checkpoint_seq was replaced"
    if not parts.plain_parameters(model):
        return "has a tensor subclass for a parameter"
    if model.cls_token is not None and not _positions_fit(model, patch_embed):
        return "its positions are not what no_embed_class says"
    for name in ("pos_drop", "patch_drop", "norm_pre"):
        if not parts.idle_dropout(modules[name]):
            return f"{name} is in the way ({type(modules[name]).__name__})"
    return None


def _positions_fit(model: Part, patch_embed: Part) -> bool:
    """Whether the number of positions tells, as the operator takes it to, if prefix tokens have one."""
    positions = model.pos_embed
    # Sharded parameters have no shape until they are gathered.
    if positions is None or positions.ndim != 3:
        return True
    return (positions.shape[1] == patch_embed.num_patches) is bool(model.no_embed_class)


def _embedding_call(model: Part, images: Any) -> str | None:
    reason = stock_wanted(images) or vision_transformer_unfusable(model)
    if reason is not None:
        return reason
    patch_embed = model._modules["patch_embed"]
    if not _projectable(patch_embed, images):
        return _REFUSED
    return None if tuple(images.shape[2:]) == tuple(patch_embed.img_size) else "images of another size"


def _reads_more(model: Part) -> str | None:
    """Why the last norm's rows beyond the prefix tokens' may reach a logit, or somebody who looks, or None."""
    if (
        model.global_pool != "token"
        or model.attn_pool is not None
        or not _READ_BY.isdisjoint(model.__dict__)
        or any(
            getattr(model._deit_fast_stock, name) is not method
            for name, method in _HEADS[model._deit_fast_stock].items()
        )
    ):
        return "more than the prefix tokens is read after the last block"
    return last_norm_unfusable(model._modules["norm"])


# The methods through which the last norm's rows are read.
_READ_BY = {"forward_features", "forward_head", "pool"}
_ROWS_READ: dict[type, int] = {vision_transformer.VisionTransformer: 1, deit.VisionTransformerDistilled: 2}


_HEADS = {stock: {name: code.original(stock, name) for name in ("forward_head", "pool")} for stock in _ROWS_READ}


def readout_unfusable(model: Part) -> str | None:
    """Why the last block is computed for all tokens in a call of the model, or None."""
    if not options.readout_wanted(model):
        return "readout=False"
    if model.num_prefix_tokens == 0:
        return "there is no prefix token"
    reason = _reads_more(model)
    if reason is not None:
        return reason
    return last_block_unfusable(model._modules["blocks"], model._modules["norm"])


def _logits(model: Part, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    rows, x = _ROWS_READ[model._deit_fast_stock], _embed(model, x)
    with _drawn_ahead(model, x):
        if attn_mask is None and not is_causal and readout_unfusable(model) is None:
            *blocks, last = model.blocks
            count(last, None)
            x = block_forward(last, _run(model, blocks, x, None, False), rows)
        else:
            # LayerNorm works by rows: what is left out changes nothing.
            x = _run(model, model.blocks, x, attn_mask, is_causal)[:, :rows].contiguous()
    return model.forward_head(model.norm(x))


def _drawn_ahead(model: Part, x: Tensor) -> AbstractContextManager:
    blocks = list(model.blocks)
    if options.compact(model) and model.training and not model.grad_checkpointing and can_draw_ahead(blocks):
        return drawn_ahead(blocks, x)
    return nullcontext()


def _embed(model: Part, images: Tensor) -> Tensor:
    return patch_embed_forward(
        model._modules["patch_embed"],
        images,
        pos_embed=model.pos_embed,
        cls_token=model.cls_token,
        dist_token=getattr(model, "dist_token", None),
    )


def _run(model: Part, blocks: Iterable[Module], x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    if attn_mask is not None or is_causal:
        for block in blocks:
            x = block(x, attn_mask=attn_mask, is_causal=is_causal)
        return x
    if model.grad_checkpointing:
        return checkpoint_seq(blocks, x)
    if isinstance(blocks, Module):
        return blocks(x)
    for block in blocks:
        x = block(x)
    return x


def _features(model: Part, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    return model.norm(_run(model, model.blocks, _embed(model, x), attn_mask, is_causal))


def _logits_call(model: Part, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
    return _embedding_call(model, x) or _reads_more(model)


def _features_call(model: Part, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
    return _embedding_call(model, x)


for _stock in (vision_transformer.VisionTransformer, deit.VisionTransformerDistilled):
    register(
        _stock,
        vision_transformer_unfusable,
        {"forward_features": Method(_features_call, _features), "forward": Method(_logits_call, _logits)},
        bypassed=("_pos_embed",),
        readout_unfusable=readout_unfusable,
    )
