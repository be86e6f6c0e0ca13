"""From images to the finished token sequence (Dosovitskiy et al. 2021, equation 1; Touvron et al. 2021, section 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import patch_embed as kernels
from deit_fast.ops import checks
from deit_fast.ops.patch_embed_backward import patch_embed_backward, stock_pixels
from deit_fast.ops.product_dtype import as_dtype, product_dtype
from deit_fast.ops.registration import cast, distribute, register


def _stock(images, weight, bias, pos_embed, cls_token, dist_token, mask_token, mask, mean, std):
    dtype = product_dtype(weight)
    images = stock_pixels(images, mean, std, weight)
    bias = None if bias is None else as_dtype(bias, dtype)
    tokens = F.conv2d(as_dtype(images, dtype), as_dtype(weight, dtype), bias, stride=weight.shape[2:])
    tokens = as_dtype(tokens, weight.dtype).flatten(2).transpose(1, 2)
    if mask is not None:
        tokens = torch.where(mask.unsqueeze(-1), mask_token.to(tokens.dtype), tokens)
    prefix = [t.expand(len(tokens), -1, -1) for t in (cls_token, dist_token) if t is not None]
    if pos_embed is not None and pos_embed.shape[1] == tokens.shape[1]:
        tokens = tokens + pos_embed
        pos_embed = None
    if prefix:
        tokens = torch.cat((*prefix, tokens), dim=1)
    if pos_embed is not None:
        tokens = tokens + pos_embed
    return tokens.contiguous()


def _check(images, weight, bias, pos_embed, cls_token, dist_token, mask_token, mask, mean, std):
    op = "patch_embed"
    if images.ndim != 4:
        raise ValueError(
            f"deit_fast.{op}: images must have shape [batch, channels, height, width], got {tuple(images.shape)}"
        )
    if weight.ndim != 4:
        raise ValueError(
            f"deit_fast.{op}: weight must have shape [width, channels, patch, patch], got {tuple(weight.shape)}"
        )
    width, channels, *patch = weight.shape
    if images.shape[1] != channels:
        raise ValueError(f"deit_fast.{op}: the weight takes {channels} channels, the images have {images.shape[1]}")
    for side, size, step in zip(("height", "width"), images.shape[2:], patch, strict=True):
        if size == 0 or size % step:
            raise ValueError(
                f"deit_fast.{op}: the image {side} must be a positive multiple of the patch size {step}, got {size}"
            )
    if images.dtype is torch.uint8:
        if mean is None or std is None:
            raise ValueError(f"deit_fast.{op}: uint8 images need mean and std, one number a channel")
        checks.vector(op, "mean", mean, channels)
        checks.vector(op, "std", std, channels)
    elif not images.is_floating_point():
        raise TypeError(f"deit_fast.{op}: images must be floating-point or uint8, got {images.dtype}")
    elif mean is not None or std is not None:
        raise ValueError(f"deit_fast.{op}: mean and std go with uint8 images; these are {images.dtype}")
    checks.vector(op, "bias", bias, width)
    for name, token in (("cls_token", cls_token), ("dist_token", dist_token), ("mask_token", mask_token)):
        if token is not None and token.shape != (1, 1, width):
            raise ValueError(f"deit_fast.{op}: {name} must have shape (1, 1, {width}), got {tuple(token.shape)}")
    patches = (images.shape[2] // patch[0]) * (images.shape[3] // patch[1])
    prefix = (cls_token is not None) + (dist_token is not None)
    if pos_embed is not None and (pos_embed.ndim != 3 or pos_embed.shape not in _pos_shapes(patches, prefix, width)):
        raise ValueError(
            f"deit_fast.{op}: pos_embed must have shape (1, {patches}, {width}) or (1, {prefix + patches}, {width}) "
            f"for these images, got {tuple(pos_embed.shape)}"
        )
    if (mask is None) != (mask_token is None):
        raise ValueError(f"deit_fast.{op}: mask and mask_token go together")
    if mask is not None and (mask.dtype is not torch.bool or mask.shape != (images.shape[0], patches)):
        raise ValueError(
            f"deit_fast.{op}: mask must be a bool tensor of shape ({images.shape[0]}, {patches}), got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    checks.same_device(
        op,
        images,
        weight=weight,
        bias=bias,
        pos_embed=pos_embed,
        cls_token=cls_token,
        dist_token=dist_token,
        mask_token=mask_token,
        mask=mask,
        mean=mean,
        std=std,
    )


def _pos_shapes(patches: int, prefix: int, width: int) -> tuple:
    return ((1, patches, width), (1, prefix + patches, width))


def _unsupported(images, weight, bias, pos_embed, cls_token, dist_token, mask_token, mask, mean, std):
    if images.dtype is torch.uint8:
        images = None
    return checks.kernel_products(weight, images, bias, pos_embed, cls_token, dist_token, mask_token)


def token_dtype(weight: Tensor, *others: Tensor | None) -> torch.dtype:
    """The sequence is promoted to the widest of projection, tokens and positions, as concatenation does."""
    dtype = weight.dtype
    for other in others:
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def _fake(images, weight, bias, pos_embed, cls_token, dist_token, mask_token, mask, mean, std):
    patches = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    prefix = (cls_token is not None) + (dist_token is not None)
    return images.new_empty(
        (images.shape[0], prefix + patches, weight.shape[0]),
        dtype=token_dtype(weight, pos_embed, cls_token, dist_token),
    )


def _save(ctx, args, tokens):
    ctx.save_for_backward(*args)


def _backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:7])
    found = patch_embed_backward(grad, *ctx.saved_tensors, needs)
    return *distribute(found, needs), None, None, None


_patch_embed = register(
    "patch_embed",
    "(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? cls_token, Tensor? dist_token, "
    "Tensor? mask_token, Tensor? mask, Tensor? mean, Tensor? std) -> Tensor",
    check=_check,
    stock=_stock,
    triton=kernels.patch_embed,
    unsupported=_unsupported,
    fake=_fake,
    autocast=lambda dtype, images, weight, *rest: (images, cast(weight, dtype), *rest),
    save=_save,
    backward=_backward,
)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    dist_token: Tensor | None = None,
    mask_token: Tensor | None = None,
    mask: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Patches of `images` [B, C, H, W] projected, prefixed and positioned: tokens [B, R + P, D].

    weight [D, C, p, p] and bias [D] are those of the patch convolution; R counts cls_token and dist_token
    ([1, 1, D] each). pos_embed is [1, R + P, D], or [1, P, D] where prefix tokens have no position (DeiT III).
    Patches where `mask` [B, P] is true become mask_token [1, 1, D], before positions are added.
    uint8 images are normalised on the way in: `(image / 255 - mean) / std`, mean and std [C].
    """
    if images.dtype is not weight.dtype and images.is_floating_point():
        checks.same_dtype("patch_embed", images, weight)
    return _patch_embed(images, weight, bias, pos_embed, cls_token, dist_token, mask_token, mask, mean, std)
