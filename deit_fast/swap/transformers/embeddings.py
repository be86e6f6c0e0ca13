"""DeiTEmbeddings and ViTEmbeddings."""

import torch
from torch import Tensor
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

from deit_fast import ops
from deit_fast.nn import parts
from deit_fast.nn.parts import Part
from deit_fast.swap.rules import Method, register, stock_wanted

_PATCH_EMBEDDINGS: parts.Classes = {}
parts.add(_PATCH_EMBEDDINGS, modeling_deit.DeiTPatchEmbeddings, modeling_vit.ViTPatchEmbeddings)


def embeddings_unfusable(embeddings: Part) -> str | None:
    patch_embeddings = embeddings._modules["patch_embeddings"]
    reason = parts.unfusable(patch_embeddings, _PATCH_EMBEDDINGS)
    if reason is not None:
        return f"patch_embeddings {reason}"
    reason = parts.unfusable(patch_embeddings._modules["projection"], parts.CONVOLUTIONS)
    if reason is not None:
        return f"patch_embeddings.projection {reason}"
    if not parts.plain_parameters(embeddings):
        return "has a tensor subclass for a parameter"
    if not parts.idle_dropout(embeddings._modules["dropout"]):
        return "dropout is active"
    return None


def _call(
    embeddings: Part,
    pixel_values: Tensor,
    bool_masked_pos: Tensor | None = None,
    interpolate_pos_encoding: bool | None = False,
) -> str | None:
    """Whatever stock would refuse is left to stock, which says why."""
    reason = stock_wanted(pixel_values) or embeddings_unfusable(embeddings)
    if reason is not None:
        return reason
    patch_embeddings = embeddings._modules["patch_embeddings"]
    if pixel_values.ndim != 4:
        return "images of another size"
    batch, channels, height, width = pixel_values.shape
    patch_height, patch_width = patch_embeddings._modules["projection"].kernel_size
    if (
        channels != patch_embeddings.num_channels
        or height % patch_height
        or width % patch_width
        or (not interpolate_pos_encoding and (height, width) != tuple(embeddings.image_size))
    ):
        return "images of another size"
    patches = (height // patch_height) * (width // patch_width)
    mask = bool_masked_pos
    if mask is None:
        return None
    masks = mask.dtype is torch.bool and mask.shape == (batch, patches) and embeddings.mask_token is not None
    return None if masks else "another mask than of its patches"


def _forward(
    embeddings: Part,
    pixel_values: Tensor,
    bool_masked_pos: Tensor | None = None,
    interpolate_pos_encoding: bool | None = False,
) -> Tensor:
    projection = embeddings._modules["patch_embeddings"]._modules["projection"]
    cls_token, dist_token = embeddings.cls_token, getattr(embeddings, "distillation_token", None)
    pos_embed = embeddings.position_embeddings
    if interpolate_pos_encoding:
        height, width = pixel_values.shape[2:]
        patches = (height // projection.kernel_size[0]) * (width // projection.kernel_size[1])
        tokens = patches + (1 if dist_token is None else 2)
        # It wants the tokens for their shape alone.
        pos_embed = embeddings.interpolate_pos_encoding(cls_token.expand(-1, tokens, -1), height, width)
    return ops.patch_embed(
        pixel_values,
        projection.weight,
        projection.bias,
        pos_embed,
        cls_token,
        dist_token,
        None if bool_masked_pos is None else embeddings.mask_token,
        bool_masked_pos,
    )


for _stock in (modeling_deit.DeiTEmbeddings, modeling_vit.ViTEmbeddings):
    register(_stock, embeddings_unfusable, {"forward": Method(_call, _forward)})
