"""timm: its ViT block with all parts, and the VisionTransformer's embedding, which becomes one operator."""

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
from timm.layers import DropPath, LayerScale, activations
from timm.layers import LayerNorm as StockLayerNorm
from timm.layers import Mlp as StockMlp
from timm.layers import PatchEmbed as StockPatchEmbed
from timm.models import deit, vision_transformer
from timm.models._manipulate import checkpoint_seq
from torch import Tensor
from torch.nn import Module

from deit_fast.nn import guards, options, parts
from deit_fast.nn.drop_path import drawn_ahead
from deit_fast.nn.forward import (
    attention_forward,
    block_forward,
    layer_norm_forward,
    mlp_forward,
    patch_embed_forward,
)
from deit_fast.nn.parts import Part
from deit_fast.nn.readout import last_block_unfusable, rows_read
from deit_fast.swap.rules import Mixin, register, stock_method, stock_wanted

if "is_causal" not in inspect.signature(vision_transformer.Block.forward).parameters:
    raise ImportError(f"deit_fast.swap needs timm 1.0.31 or newer, found {timm.__version__}")


def layer_norm_unfusable(norm: Part) -> str | None:
    if norm._fast_norm:
        return "timm's fast norm is set"
    return guards.layer_norm_unfusable(norm)


class LayerNorm(StockLayerNorm):
    _stock_forward = stock_method(StockLayerNorm.forward)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._stock_forward(x)
        elif not isinstance(self, LayerNorm):
            return type(self).forward(self, x)
        elif stock_wanted(x) or layer_norm_unfusable(self) is not None:
            return self._stock_forward(x)
        else:
            return layer_norm_forward(self, x)


class Attention(vision_transformer.Attention):
    _stock_forward = stock_method(vision_transformer.Attention.forward)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if torch.jit.is_scripting():
            return self._stock_forward(x, attn_mask, is_causal)
        elif not isinstance(self, Attention):
            return type(self).forward(self, x, attn_mask, is_causal)
        elif attn_mask is not None or is_causal or stock_wanted(x) or guards.attention_unfusable(self) is not None:
            return self._stock_forward(x, attn_mask, is_causal)
        else:
            return attention_forward(self, x)


class Mlp(StockMlp):
    _stock_forward = stock_method(StockMlp.forward)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._stock_forward(x)
        elif not isinstance(self, Mlp):
            return type(self).forward(self, x)
        elif stock_wanted(x) or guards.mlp_unfusable(self) is not None:
            return self._stock_forward(x)
        else:
            return mlp_forward(self, x)


class Block(vision_transformer.Block):
    # Set where a model that is not timm's reads no more of the last block (`nn.readout.reading`).
    readout_rows = None
    _stock_forward = stock_method(vision_transformer.Block.forward)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if torch.jit.is_scripting():
            return self._stock_forward(x, attn_mask, is_causal)
        elif not isinstance(self, Block):
            return type(self).forward(self, x, attn_mask, is_causal)
        elif attn_mask is not None or is_causal or stock_wanted(x) or guards.block_unfusable(self) is not None:
            return self._stock_forward(x, attn_mask, is_causal)
        else:
            return block_forward(self, x, rows_read(self))


# Patch embedding --------------------------------------------------------------------------------------------------


def patch_embed_unfusable(patch_embed: Part) -> str | None:
    if not patch_embed.flatten:
        return "gives a grid of patches, not a sequence"
    if patch_embed.dynamic_img_pad:
        return "pads its images"
    return guards.patch_embed_unfusable(patch_embed)


def _whole_patches(patch_embed: Part, images: Tensor) -> bool:
    """Whether stock accepts these images and every pixel belongs to a patch; stock words the errors."""
    if images.ndim != 4:
        return False
    height, width = images.shape[2:]
    if patch_embed.strict_img_size and patch_embed.img_size is not None:
        return (height, width) == tuple(patch_embed.img_size)
    return height % patch_embed.patch_size[0] == 0 and width % patch_embed.patch_size[1] == 0


class PatchEmbed(StockPatchEmbed):
    _stock_forward = stock_method(StockPatchEmbed.forward)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._stock_forward(x)
        elif not isinstance(self, PatchEmbed):
            return type(self).forward(self, x)
        elif stock_wanted(x) or patch_embed_unfusable(self) is not None or not _whole_patches(self, x):
            return self._stock_forward(x)
        else:
            return patch_embed_forward(self, x)


_PATCH_EMBEDS: set[type] = {PatchEmbed}

# The model: its embedding in one operator, then blocks and norm as modules ------------------------------------------


def vision_transformer_unfusable(model: Part) -> str | None:
    modules = model._modules
    patch_embed = modules["patch_embed"]
    reason = parts.unfusable(patch_embed, _PATCH_EMBEDS)
    if reason is not None:
        return f"patch_embed {reason}"
    reason = patch_embed_unfusable(patch_embed)
    if reason is not None:
        return f"patch_embed: {reason}"
    if model.dynamic_img_size or patch_embed.img_size is None:
        return "takes images of any size"
    if model.reg_token is not None:
        return "has register tokens"
    if not parts.plain_parameters(model):
        return "has a tensor subclass for a parameter"
    if "_pos_embed" in model.__dict__:
        return "has a _pos_embed of its own on the instance"
    for name in ("pos_drop", "patch_drop", "norm_pre"):
        if not parts.idle_dropout(modules[name]):
            return f"{name} is in the way ({type(modules[name]).__name__})"
    return None


def _embeds(model: Part, images: Any) -> bool:
    return (
        not stock_wanted(images)
        and vision_transformer_unfusable(model) is None
        and images.ndim == 4
        and tuple(images.shape[2:]) == tuple(model._modules["patch_embed"].img_size)
    )


def _reads_prefix_only(model: Part) -> bool:
    """Whether the last norm's rows beyond the prefix tokens' reach no logit, and nobody else sees them."""
    return (
        model.global_pool == "token"
        and model.attn_pool is None
        and parts.touched(model._modules["norm"]) is None
        and "forward_features" not in model.__dict__
        and "forward_head" not in model.__dict__
        and "pool" not in model.__dict__
    )


def readout_unfusable(model: Part) -> str | None:
    """Why the last block is computed for all tokens in a call of the model, or None."""
    if not options.readout_wanted(model):
        return "readout=False"
    if model.num_prefix_tokens == 0:
        return "there is no prefix token"
    if not _reads_prefix_only(model):
        return "more than the prefix tokens is read after the last block"
    return last_block_unfusable(model._modules["blocks"], model._modules["norm"])


def _logits(model: Part, images: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    prefix, x = model.num_prefix_tokens, _embed(model, images)
    with _drawn_ahead(model, x):
        if attn_mask is None and not is_causal and readout_unfusable(model) is None:
            *blocks, last = model.blocks
            x = block_forward(last, _run(model, blocks, x, None, False), prefix)
        else:
            # LayerNorm works by rows: what is left out changes nothing.
            x = _run(model, model.blocks, x, attn_mask, is_causal)[:, :prefix].contiguous()
    return model.forward_head(model.norm(x))


def _drawn_ahead(model: Part, x: Tensor) -> AbstractContextManager:
    blocks = list(model.blocks)
    if (
        options.compact(model)
        and model.training
        and not model.grad_checkpointing
        and not torch.compiler.is_compiling()
        and all(parts.unfusable(b, parts.BLOCKS) is None and guards.block_unfusable(b) is None for b in blocks)
    ):
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


class _VisionTransformer(Mixin):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if torch.jit.is_scripting():
            return self._stock_forward(x, attn_mask, is_causal)
        elif not isinstance(self, _VisionTransformer):
            return type(self).forward(self, x, attn_mask, is_causal)
        elif not _embeds(self, x) or not _reads_prefix_only(self):
            return self._stock_forward(x, attn_mask, is_causal)
        else:
            return _logits(self, x, attn_mask, is_causal)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if torch.jit.is_scripting():
            return self._stock_forward_features(x, attn_mask, is_causal)
        elif not isinstance(self, _VisionTransformer):
            return type(self).forward_features(self, x, attn_mask, is_causal)
        elif not _embeds(self, x):
            return self._stock_forward_features(x, attn_mask, is_causal)
        else:
            return self.norm(_run(self, self.blocks, _embed(self, x), attn_mask, is_causal))


class VisionTransformer(_VisionTransformer, vision_transformer.VisionTransformer):
    _stock_forward = stock_method(vision_transformer.VisionTransformer.forward)
    _stock_forward_features = stock_method(vision_transformer.VisionTransformer.forward_features)


class VisionTransformerDistilled(_VisionTransformer, deit.VisionTransformerDistilled):
    _stock_forward = stock_method(deit.VisionTransformerDistilled.forward)
    _stock_forward_features = stock_method(deit.VisionTransformerDistilled.forward_features)


parts.LAYER_NORMS.update((StockLayerNorm, LayerNorm))
parts.ATTENTIONS.add(Attention)
parts.MLPS.add(Mlp)
parts.BLOCKS.add(Block)
parts.LAYER_SCALES.add(LayerScale)
parts.DROP_PATHS.add(DropPath)
parts.GELUS.update({activations.GELU: "gelu", activations.GELUTanh: "gelu_tanh"})

register(StockLayerNorm, LayerNorm, layer_norm_unfusable)
register(vision_transformer.Attention, Attention, guards.attention_unfusable)
register(StockMlp, Mlp, guards.mlp_unfusable)
register(vision_transformer.Block, Block, guards.block_unfusable)
register(StockPatchEmbed, PatchEmbed, patch_embed_unfusable)
for _stock, _swapped in (
    (vision_transformer.VisionTransformer, VisionTransformer),
    (deit.VisionTransformerDistilled, VisionTransformerDistilled),
):
    register(
        _stock, _swapped, vision_transformer_unfusable, method="forward_features", readout_unfusable=readout_unfusable
    )
