"""From images to the finished token sequence (Dosovitskiy et al. 2021, equation 1; Touvron et al. 2021, section 4)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import patch_embed as kernels
from deit_fast.ops import checks
from deit_fast.ops.arguments import PerSample, Shared
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.flops import product_flops
from deit_fast.ops.operator import BackwardOperator, Operator, distribute, empty_gradients
from deit_fast.ops.pixels import normalised
from deit_fast.ops.product_dtype import as_dtype, product_dtype

GRADIENTS = ("images", "weight", "bias", "pos_embed", "cls_token", "dist_token", "mask_token")


def stock_pixels(images: Tensor, mean: Tensor | None, std: Tensor | None, weight: Tensor) -> Tensor:
    """uint8 images normalised, in float32 at least; others as they are."""
    if images.dtype is not torch.uint8 or mean is None or std is None:
        return images
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return normalised(images, mean.to(dtype), std.to(dtype))


def token_dtype(weight: Tensor, *others: Tensor | None) -> torch.dtype:
    """The sequence is promoted to the widest of projection, tokens and positions, as concatenation does."""
    dtype = weight.dtype
    for other in others:
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def _lying_as(images: Tensor, gradient: Tensor) -> Tensor:
    """A convolution takes its own choice of strides; ours are those of the images."""
    batched = torch._C._functorch
    # Nobody sees those of batched gradients, which have no copy into what is not batched.
    if batched.is_batchedtensor(gradient) or batched.is_legacy_batchedtensor(gradient):
        return gradient
    return torch.empty_like(images).copy_(gradient)


def _flops(images: Tensor, weight: Tensor) -> int:
    """Of one product of all patches with the weight."""
    patches = images.shape[0] * images.shape[2] * images.shape[3] // (weight.shape[2] * weight.shape[3])
    return product_flops(patches, weight)


class _PatchEmbedBackward(BackwardOperator):
    """Of projection, positions, prefix and mask tokens, and the image."""

    name = "patch_embed_backward"
    launcher = staticmethod(kernels.patch_embed_backward)

    @staticmethod
    def stock(
        grad: PerSample,
        images: PerSample,
        weight: Shared,
        bias: Shared | None,
        pos_embed: Shared | None,
        cls_token: Shared | None,
        dist_token: Shared | None,
        mask_token: Shared | None,
        mask: PerSample | None,
        mean: Shared | None,
        std: Shared | None,
        needs: list[bool],
    ) -> list[Tensor]:
        need_images, need_weight, need_bias, need_pos_embed, need_cls, need_dist, need_mask_token = needs
        prefix = (cls_token is not None) + (dist_token is not None)
        wide = torch.promote_types(grad.dtype, torch.float32)
        of_patches = grad[:, prefix:]
        gradients: dict[str, Tensor] = {}
        if need_pos_embed and pos_embed is not None:
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
            # No unflatten: batched gradients have no rule for it.
            of_grid = as_dtype(of_patches, dtype).transpose(1, 2).reshape(len(images), len(weight), *grid)
            of_pixels, of_weight, _ = torch.ops.aten.convolution_backward(
                of_grid, as_dtype(pixels, dtype), as_dtype(weight, dtype), None,
                patch, [0, 0], [1, 1], False, [0, 0], 1, [need_images, need_weight, False],
            )  # fmt: skip
            if need_images:
                gradients["images"] = _lying_as(images, of_pixels)
            if need_weight:
                gradients["weight"] = of_weight.contiguous()
        inputs = (images, weight, bias, pos_embed, cls_token, dist_token, mask_token)
        wanted = zip(GRADIENTS, inputs, needs, strict=True)
        return [gradients[name].to(i.dtype) for name, i, need in wanted if need and i is not None]

    def unsupported(self, a: Any) -> str | None:
        return checks.kernel_products(a.weight, a.grad)

    def fake(self, a: Any) -> list[Tensor]:
        parameters = (a.weight, a.bias, a.pos_embed, a.cls_token, a.dist_token, a.mask_token)
        of_images = [torch.empty_like(a.images)] if a.needs[0] else []
        return of_images + empty_gradients(parameters, a.needs[1:])

    def flops(self, a: Any) -> int:
        need_images, need_weight, *_ = a.needs
        return (need_images + need_weight) * _flops(a.images, a.weight)


patch_embed_backward = _PatchEmbedBackward()


class _PatchEmbed(Operator):
    name = "patch_embed"
    launcher = staticmethod(kernels.patch_embed)
    casts = ("weight",)
    saves = (*GRADIENTS, "mask", "mean", "std")
    data = ("mask", "mean", "std")

    @staticmethod
    def stock(
        images: PerSample,
        weight: Shared,
        bias: Shared | None,
        pos_embed: Shared | None,
        cls_token: Shared | None,
        dist_token: Shared | None,
        mask_token: Shared | None,
        mask: PerSample | None,
        mean: Shared | None,
        std: Shared | None,
    ) -> Tensor:
        dtype = product_dtype(weight)
        images = stock_pixels(images, mean, std, weight)
        bias = None if bias is None else as_dtype(bias, dtype)
        tokens = F.conv2d(as_dtype(images, dtype), as_dtype(weight, dtype), bias, stride=weight.shape[2:])
        tokens = as_dtype(tokens, weight.dtype).flatten(2).transpose(1, 2)
        if mask is not None and mask_token is not None:
            tokens = torch.where(mask.unsqueeze(-1), mask_token.to(tokens.dtype), tokens)
        prefix = [t.expand(tokens.shape[0], -1, -1) for t in (cls_token, dist_token) if t is not None]
        if pos_embed is not None and pos_embed.shape[1] == tokens.shape[1]:
            tokens = tokens + pos_embed
            pos_embed = None
        if prefix:
            tokens = torch.cat((*prefix, tokens), dim=1)
        if pos_embed is not None:
            tokens = tokens + pos_embed
        return tokens.contiguous()

    def check(self, a: Any) -> None:
        _check(*a)

    def unsupported(self, a: Any) -> str | None:
        images = None if a.images.dtype is torch.uint8 else a.images
        tokens = (a.cls_token, a.dist_token, a.mask_token)
        return checks.kernel_products(a.weight, images, a.bias, a.pos_embed, *tokens)

    def fake(self, a: Any) -> Tensor:
        patches = (a.images.shape[2] // a.weight.shape[2]) * (a.images.shape[3] // a.weight.shape[3])
        prefix = (a.cls_token is not None) + (a.dist_token is not None)
        return a.images.new_empty(
            (a.images.shape[0], prefix + patches, a.weight.shape[0]),
            dtype=token_dtype(a.weight, a.pos_embed, a.cls_token, a.dist_token),
        )

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return distribute(patch_embed_backward(grads[0], *a, needs), needs)

    def flops(self, a: Any) -> int:
        return _flops(a.images, a.weight)

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        rows, columns = size.grid
        shape = (size.batch, 3, rows * size.patch, columns * size.patch)
        patches = rows * columns

        def arguments(**others: Tensor) -> dict[str, Any]:
            return {
                "weight": new.normal(size.width, 3, size.patch, size.patch, scale=(3 * size.patch**2) ** -0.5),
                "bias": new.normal(size.width, scale=0.1),
                "pos_embed": new.normal(1, 2 + patches, size.width),
                "cls_token": new.normal(1, 1, size.width),
                "dist_token": new.normal(1, 1, size.width),
                "mask_token": None,
                "mask": None,
                "mean": None,
                "std": None,
            } | others

        yield Example("", {"images": new.normal(*shape), **arguments()})
        mask = torch.arange(size.batch * patches).view(size.batch, patches) % 3 == 0
        masked = {"mask_token": new.normal(1, 1, size.width), "mask": new.data(mask)}
        yield Example("masked", {"images": new.normal(*shape), **arguments(**masked)})
        pixels = new.integers(*shape, below=256, dtype=torch.uint8)
        statistics = {"mean": new.data(torch.tensor([0.5, 0.4, 0.3])), "std": new.data(torch.tensor([0.2, 0.3, 0.4]))}
        yield Example("of uint8 pixels", {"images": pixels, **arguments(**statistics)})


def _check(
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
) -> None:
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


def _pos_shapes(patches: int, prefix: int, width: int) -> tuple[tuple[int, ...], ...]:
    return ((1, patches, width), (1, prefix + patches, width))


_patch_embed = _PatchEmbed()


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
