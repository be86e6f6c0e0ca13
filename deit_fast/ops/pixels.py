"""From the bytes of images to what a model computes with, in one pass: normalised, erased and mixed.

Random erasing (Zhong et al. 2017), mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), as timm has them; what is
drawn for them is given.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deit_fast.kernels import pixels as kernels
from deit_fast.ops import checks
from deit_fast.ops.arguments import PerSample, Shared
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.operator import Operator


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`(images / 255 - mean) / std` of bytes [B, C, H, W], in the dtype of mean and std [C].

    The bits are those of torchvision's ToTensor and Normalize.
    """
    # By a tensor: a GPU multiplies by the reciprocal of a number.
    pixels = images.to(mean.dtype).div_(mean.new_full((), 255))
    return pixels.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def _erase(pixels: Tensor, erased: Tensor, noise: Tensor) -> Tensor:
    """`pixels`, of which a CPU writes the rectangles alone; elsewhere nobody waits to read where they are."""
    if erased.is_cpu and not torch.compiler.is_compiling():
        for image, rectangles in zip(pixels, erased.tolist(), strict=True):
            for top, left, height, width, first in rectangles:
                region = image[:, top : top + height, left : left + width]
                region.copy_(noise[first : first + region.numel()].view(region.shape))
        return pixels
    channel = torch.arange(pixels.shape[1], device=pixels.device).view(-1, 1, 1)
    for rectangle in erased.unbind(1):
        inside, row, column = _within(rectangle, pixels)
        height, width, first = rectangle[:, 2:].view(-1, 3, 1, 1, 1).unbind(1)
        place = first + (channel * height + row) * width + column
        pixels = torch.where(inside, noise[place.where(inside, 0)].to(pixels.dtype), pixels)
    return pixels


def _within(rectangle: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which pixels [B, C, H, W] lie in one rectangle an image, [B, 1, H, W], and their rows and columns in it.

    rectangle: [B, 4 or more], int32: top, left, height, width.
    """
    top, left, height, width = rectangle[:, :4].view(-1, 4, 1, 1, 1).unbind(1)
    row = torch.arange(pixels.shape[2], device=pixels.device).view(-1, 1) - top
    column = torch.arange(pixels.shape[3], device=pixels.device) - left
    return (row >= 0) & (row < height) & (column >= 0) & (column < width), row, column


class _NormalisePixels(Operator):
    name = "normalise_pixels"
    launcher = staticmethod(kernels.normalise_pixels)
    data = ("images", "mean", "std", "erased", "noise", "shares", "boxes")
    data_outputs = (0,)

    @staticmethod
    def stock(
        images: PerSample,
        mean: Shared,
        std: Shared,
        dtype: torch.dtype,
        erased: PerSample | None,
        noise: Shared | None,
        shares: PerSample | None,
        boxes: PerSample | None,
    ) -> Tensor:
        pixels = normalised(images, mean, std)
        if erased is not None and noise is not None:
            pixels = _erase(pixels, erased, noise)
        if shares is not None or boxes is not None:
            partners = pixels.flip(0)
            if shares is not None:
                # timm's order of operations, for its bits.
                own, other = shares.to(pixels.dtype).view(-1, 2, 1, 1, 1).unbind(1)
                pixels.mul_(own).add_(partners * other)
            if boxes is not None:
                pixels = torch.where(_within(boxes, pixels)[0], partners, pixels)
        return pixels.to(_result_dtype(mean, dtype)).contiguous()

    def check(self, a: Any) -> None:
        _check(*a)

    def unsupported(self, a: Any) -> str | None:
        return checks.kernel_dtypes(a.mean)

    def fake(self, a: Any) -> Tensor:
        return a.images.new_empty(a.images.shape, dtype=_result_dtype(a.mean, a.dtype))

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return ()

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        rows, columns = (size.patch * side for side in size.grid)
        arguments = {
            "images": new.integers(size.batch, 3, rows, columns, below=256, dtype=torch.uint8),
            "mean": new.data(torch.tensor([0.5, 0.4, 0.3])),
            "std": new.data(torch.tensor([0.2, 0.3, 0.4])),
            "dtype": new.dtype,
            "erased": None,
            "noise": None,
            "shares": None,
            "boxes": None,
        }
        yield Example("", arguments)
        # A rectangle of every second image, another of all.
        erased = torch.tensor([1, 2, rows // 2, columns // 3, 0]).repeat(size.batch, 2, 1)
        erased[:, 1, 0] = rows // 2
        erased[1::2, 0, 2:] = 0
        noise = torch.randn(3 * (rows // 2) * (columns // 3), generator=new.generator)
        erasing = {"erased": new.data(erased.int()), "noise": new.data(noise)}
        lam = torch.rand(size.batch, generator=new.generator)
        shares = new.data(torch.stack((lam, 1 - lam), 1))
        boxes = new.data(torch.tensor([rows // 4, 3, rows // 2, columns // 2], dtype=torch.int32).repeat(size.batch, 1))
        yield Example("erased and mixed", arguments | erasing | {"shares": shares})
        yield Example("cut and mixed", arguments | {"boxes": boxes, "shares": shares})


def _result_dtype(mean: Tensor, dtype: torch.dtype) -> torch.dtype:
    return mean.dtype if mean.dtype is torch.float64 else dtype


def _check(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    erased: Tensor | None,
    noise: Tensor | None,
    shares: Tensor | None,
    boxes: Tensor | None,
) -> None:
    op = "normalise_pixels"
    if images.ndim != 4 or images.dtype is not torch.uint8:
        raise ValueError(
            f"deit_fast.{op}: images must be uint8 of shape [batch, channels, height, width], got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    batch, channels = images.shape[:2]
    for name, numbers in (("mean", mean), ("std", std)):
        checks.vector(op, name, numbers, channels)
        if numbers.dtype not in (torch.float32, torch.float64) or numbers.dtype is not mean.dtype:
            raise TypeError(f"deit_fast.{op}: {name} must be float32, or both float64, got {numbers.dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"deit_fast.{op}: dtype must be floating-point, got {dtype}")
    if (erased is None) != (noise is None):
        raise ValueError(f"deit_fast.{op}: erased and noise go together")
    if noise is not None and (noise.ndim != 1 or not noise.numel() or not noise.is_floating_point()):
        raise ValueError(
            f"deit_fast.{op}: noise must be a floating-point vector of one number or more, got {noise.dtype} "
            f"{tuple(noise.shape)}"
        )
    if erased is not None and (erased.dtype is not torch.int32 or erased.ndim != 3 or _ends(erased) != (batch, 5)):
        raise ValueError(
            f"deit_fast.{op}: erased must be int32 of shape ({batch}, rectangles, 5), got {erased.dtype} "
            f"{tuple(erased.shape)}"
        )
    if shares is not None and (not shares.is_floating_point() or shares.shape != (batch, 2)):
        raise ValueError(
            f"deit_fast.{op}: shares must be floating-point of shape ({batch}, 2), got {shares.dtype} "
            f"{tuple(shares.shape)}"
        )
    if boxes is not None and (boxes.dtype is not torch.int32 or boxes.shape != (batch, 4)):
        raise ValueError(
            f"deit_fast.{op}: boxes must be int32 of shape ({batch}, 4), got {boxes.dtype} {tuple(boxes.shape)}"
        )
    checks.same_device(op, images, mean=mean, std=std, erased=erased, noise=noise, shares=shares, boxes=boxes)


def _ends(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[0], tensor.shape[-1]


_normalise_pixels = _NormalisePixels()


def normalise_pixels(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype = torch.float32,
    erased: Tensor | None = None,
    noise: Tensor | None = None,
    shares: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Tensor:
    """`(image / 255 - mean) / std` of uint8 `images` [B, C, H, W], then erased, then mixed: [B, C, H, W] in `dtype`.

    mean, std: [C], float32; of float64 the result is float64. It is computed in their dtype, and rounded once.

    erased [B, R, 5], int32, has rectangles of each image: top, left, height, width, and where in `noise` [N] the
    numbers [C, height, width] begin that fill it. A height or width of 0 erases nothing. Where rectangles of an image
    overlap they must agree. All must lie within the image and their numbers within `noise`: a GPU does not check that.

    Image i is mixed with image B - 1 - i, as timm's Mixup pairs them: shares [B, 2] is what each keeps of itself and
    what it takes of its partner, mixup's lam and 1 - lam. Within boxes [B, 4], int32 (top, left, height, width), it is
    its partner: CutMix.

    Raises:
        ValueError, TypeError: arguments of other shapes or dtypes.
    """
    return _normalise_pixels(images, mean, std, dtype, erased, noise, shares, boxes)
