"""Gradients of the patch embedding: projection, positions, prefix and mask tokens, and the image."""

import torch
from torch import Tensor

from deit_fast.kernels import patch_embed_backward as kernels
from deit_fast.ops import checks
from deit_fast.ops.product_dtype import as_dtype, product_dtype
from deit_fast.ops.registration import register_backward

GRADIENTS = ("images", "weight", "bias", "pos_embed", "cls_token", "dist_token", "mask_token")


def stock_pixels(images: Tensor, mean: Tensor | None, std: Tensor | None, weight: Tensor) -> Tensor:
    """uint8 images normalised, in float32 at least; others as they are."""
    if images.dtype is not torch.uint8:
        return images
    dtype = torch.promote_types(weight.dtype, torch.float32)
    mean, std = (t.to(dtype).view(-1, 1, 1) for t in (mean, std))
    return (images.to(dtype) / 255 - mean) / std


def _stock(
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
    need_images, need_weight, need_bias, need_pos_embed, need_cls, need_dist, need_mask_token = needs
    prefix = (cls_token is not None) + (dist_token is not None)
    wide = torch.promote_types(grad.dtype, torch.float32)
    of_patches = grad[:, prefix:]
    gradients = {}
    if need_pos_embed:
        positioned = grad if pos_embed.shape[1] == grad.shape[1] else of_patches
        gradients["pos_embed"] = positioned.sum(0, keepdim=True, dtype=wide)
    if need_cls:
        gradients["cls_token"] = grad[:, :1].sum(0, keepdim=True, dtype=wide)
    if need_dist:
        gradients["dist_token"] = grad[:, prefix - 1 : prefix].sum(0, keepdim=True, dtype=wide)
    if mask is not None:
        hidden = mask.unsqueeze(-1)
        if need_mask_token:
            gradients["mask_token"] = (of_patches * hidden).sum((0, 1), dtype=wide).view(1, 1, -1)
        of_patches = of_patches.masked_fill(hidden, 0)
    if need_bias:
        gradients["bias"] = of_patches.sum((0, 1), dtype=wide)
    if need_images or need_weight:
        dtype, patch = product_dtype(weight), weight.shape[2:]
        pixels = stock_pixels(images, mean, std, weight)
        grid = [images.shape[2] // patch[0], images.shape[3] // patch[1]]
        of_grid = as_dtype(of_patches, dtype).transpose(1, 2).unflatten(2, grid)
        of_pixels, of_weight, _ = torch.ops.aten.convolution_backward(
            of_grid, as_dtype(pixels, dtype), as_dtype(weight, dtype), None, patch, [0, 0], [1, 1], False, [0, 0], 1,
            [need_images, need_weight, False],
        )  # fmt: skip
        if need_images:
            # A convolution takes its own choice; ours lies as the images do.
            gradients["images"] = torch.empty_like(images).copy_(of_pixels)
        if need_weight:
            gradients["weight"] = of_weight.contiguous()
    inputs = (images, weight, bias, pos_embed, cls_token, dist_token, mask_token)
    return [gradients[name].to(i.dtype) for name, i, need in zip(GRADIENTS, inputs, needs, strict=True) if need]


def _fake(grad, images, weight, bias, pos_embed, cls_token, dist_token, mask_token, mask, mean, std, needs):
    parameters = (weight, bias, pos_embed, cls_token, dist_token, mask_token)
    gradients = [torch.empty_like(images)] if needs[0] else []
    return gradients + [
        torch.empty(p.shape, dtype=p.dtype, device=p.device) for p, n in zip(parameters, needs[1:], strict=True) if n
    ]


patch_embed_backward = register_backward(
    "patch_embed_backward",
    "(Tensor grad, Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? cls_token, "
    "Tensor? dist_token, Tensor? mask_token, Tensor? mask, Tensor? mean, Tensor? std, bool[] needs) -> Tensor[]",
    stock=_stock,
    triton=kernels.patch_embed_backward,
    unsupported=lambda grad, images, weight, *_: checks.kernel_products(weight, grad),
    fake=_fake,
)
