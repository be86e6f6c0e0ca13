"""Backward of the patch embedding: the projection's by implicit GEMMs over the images, all others as sums of rows."""

import torch
from torch import Tensor

from deit_fast.kernels.launching.layout import dense, unit_stride
from deit_fast.kernels.patch_embed.image_gradient import image_gradient
from deit_fast.kernels.patch_embed.token_gradients import token_gradients
from deit_fast.kernels.patch_embed.weight_gradient import patch_weight_gradient


def patch_embed_backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    dist_token: Tensor | None,
    mask_token: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Those gradients of `images`, …, `mask_token` that `needs` asks for, each like its argument.

    grad: [B, R + P, D], of the tokens. Dots run in weight's dtype, every sum in float32. Of bias, positions and
    tokens only shape and dtype matter. Masked patches have no gradient but the mask token's.
    """
    inputs = (images, weight, bias, pos_embed, cls_token, dist_token, mask_token)
    outputs = [
        torch.empty_like(x, memory_format=torch.preserve_format if x is images else torch.contiguous_format)
        if need and x is not None
        else None
        for x, need in zip(inputs, needs, strict=True)
    ]
    if grad.numel() == 0:
        return [output.zero_() for output in outputs if output is not None]
    of_images, of_weight, of_bias, of_pos_embed, of_cls_token, of_dist_token, of_mask_token = outputs
    grad = unit_stride(grad)
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    prefix = (cls_token is not None) + (dist_token is not None)
    if of_weight is not None:
        patch_weight_gradient(grad, images, mask, dense(mean), dense(std), prefix, of_weight)
    if of_images is not None:
        image_gradient(grad, weight.contiguous(), mask, prefix, of_images)
    if any(needs[2:]):
        prefix_tokens = [of for of, x in ((of_cls_token, cls_token), (of_dist_token, dist_token)) if x is not None]
        token_gradients(grad, mask, prefix_tokens, of_pos_embed, of_bias, of_mask_token)
    return [of for of in outputs if of is not None]
