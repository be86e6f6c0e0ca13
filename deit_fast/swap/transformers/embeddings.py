"""DeiTEmbeddings and ViTEmbeddings."""

import torch
from torch import Tensor
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

from deit_fast import ops
from deit_fast.nn import parts
from deit_fast.nn.parts import Part
from deit_fast.swap.rules import Mixin, register, stock_wanted

_PATCH_EMBEDDINGS: set[type] = {modeling_deit.DeiTPatchEmbeddings, modeling_vit.ViTPatchEmbeddings}


def embeddings_unfusable(embeddings: Part) -> str | None:
    patch_embeddings = embeddings._modules["patch_embeddings"]
    reason = parts.unfusable(patch_embeddings, _PATCH_EMBEDDINGS)
    if reason is not None:
        return f"patch_embeddings {reason}"
    reason = parts.unfusable(patch_embeddings._modules["projection"], {torch.nn.Conv2d})
    if reason is not None:
        return f"patch_embeddings.projection {reason}"
    if not parts.plain_parameters(embeddings):
        return "has a tensor subclass for a parameter"
    if not parts.idle_dropout(embeddings._modules["dropout"]):
        return "dropout is active"
    return None


def _embeds(embeddings: Part, pixel_values: Tensor, mask: Tensor | None, interpolate: bool | None) -> bool:
    """Whether the operator computes this call; whatever stock would refuse is left to stock, which says why."""
    if stock_wanted(pixel_values) or embeddings_unfusable(embeddings) is not None or pixel_values.ndim != 4:
        return False
    patch_embeddings = embeddings._modules["patch_embeddings"]
    batch, channels, height, width = pixel_values.shape
    patch_height, patch_width = patch_embeddings._modules["projection"].kernel_size
    if channels != patch_embeddings.num_channels or height % patch_height or width % patch_width:
        return False
    if not interpolate and (height, width) != tuple(embeddings.image_size):
        return False
    patches = (height // patch_height) * (width // patch_width)
    return mask is None or (
        mask.dtype is torch.bool and mask.shape == (batch, patches) and embeddings.mask_token is not None
    )


def _embeddings_forward(
    embeddings: Part, pixel_values: Tensor, mask: Tensor | None, interpolate: bool | None
) -> Tensor:
    projection = embeddings._modules["patch_embeddings"]._modules["projection"]
    cls_token, dist_token = embeddings.cls_token, getattr(embeddings, "distillation_token", None)
    pos_embed = embeddings.position_embeddings
    if interpolate:
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
        None if mask is None else embeddings.mask_token,
        mask,
    )


class _Embeddings(Mixin):
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
    ) -> Tensor:
        if not isinstance(self, _Embeddings):
            return type(self).forward(self, pixel_values, bool_masked_pos, interpolate_pos_encoding)
        if not _embeds(self, pixel_values, bool_masked_pos, interpolate_pos_encoding):
            return super().forward(pixel_values, bool_masked_pos, interpolate_pos_encoding)
        return _embeddings_forward(self, pixel_values, bool_masked_pos, interpolate_pos_encoding)


class DeiTEmbeddings(_Embeddings, modeling_deit.DeiTEmbeddings):
    pass


class ViTEmbeddings(_Embeddings, modeling_vit.ViTEmbeddings):
    pass


register(modeling_deit.DeiTEmbeddings, DeiTEmbeddings, embeddings_unfusable)
register(modeling_vit.ViTEmbeddings, ViTEmbeddings, embeddings_unfusable)
