"""Bytes of images to normalised, erased and mixed pixels: each is read once, or twice by a partner, and written once.

A program takes a piece of one channel of one image, and the same piece of the partner's where they are mixed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.launching import run
from deit_fast.kernels.launching.layout import dense
from deit_fast.kernels.launching.metadata import described

# 16 bytes a thread.
_BLOCK, _WARPS = 2048, 4


@triton.jit(
    **described("normalise_pixels_kernel", lambda a: a["pixels_ptr"].shape, ("erased_ptr", "shares_ptr", "boxes_ptr"))
)
def normalise_pixels_kernel(
    images_ptr,  # [batch, channels, area], uint8
    mean_ptr,  # [channels], float32
    std_ptr,  # [channels], float32
    erased_ptr,  # [batch, RECTANGLES, 5], int32, or None
    noise_ptr,  # [N] or None
    shares_ptr,  # [batch, 2] or None
    boxes_ptr,  # [batch, 4], int32, or None
    pixels_ptr,  # [batch, channels, area]
    batch,
    channels,
    area,
    width,
    RECTANGLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`x = (u / 255 - mean) / std`, within a rectangle noise, and of x and its partner's y `own x + other y` or y.

    Random erasing (Zhong et al. 2017), mixup (Zhang et al. 2018), CutMix (Yun et al. 2019). The partner is counted from
    the batch's other end.
    """
    pieces = tl.cdiv(area, BLOCK)
    plane = tl.program_id(0) // pieces
    sample, channel = plane // channels, plane % channels
    place = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    mean, std = tl.load(mean_ptr + channel), tl.load(std_ptr + channel)
    x = _erased(images_ptr, erased_ptr, noise_ptr, sample, channel, channels, place, area, width, mean, std, RECTANGLES)
    if shares_ptr is not None or boxes_ptr is not None:
        y = _erased(
            images_ptr, erased_ptr, noise_ptr, batch - 1 - sample, channel, channels, place, area, width, mean, std,
            RECTANGLES,
        )  # fmt: skip
        if shares_ptr is not None:
            own = tl.load(shares_ptr + sample * 2).to(tl.float32)
            other = tl.load(shares_ptr + sample * 2 + 1).to(tl.float32)
            x = x * own + y * other
        if boxes_ptr is not None:
            inside, _, _ = _within(boxes_ptr + sample * 4, place, width)
            x = tl.where(inside, y, x)
    row = pixels_ptr + plane.to(tl.int64) * area
    tl.store(row + place, x.to(pixels_ptr.dtype.element_ty), mask=place < area)


@triton.jit
def _erased(
    images_ptr, erased_ptr, noise_ptr, sample, channel, channels, place, area, width, mean, std,
    RECTANGLES: tl.constexpr,
):  # fmt: skip
    """A piece of one image's channel in float32, normalised, with what is erased of it."""
    row = images_ptr + (sample * channels + channel).to(tl.int64) * area
    x = tl.load(row + place, mask=place < area, other=0).to(tl.float32)
    # Quotients as torchvision rounds them.
    x = tl.div_rn(tl.div_rn(x, 255.0) - mean, std)
    for i in tl.static_range(RECTANGLES):
        rectangle = erased_ptr + (sample * RECTANGLES + i) * 5
        inside, from_top, from_left = _within(rectangle, place, width)
        inside &= place < area
        rows, columns, first = tl.load(rectangle + 2), tl.load(rectangle + 3), tl.load(rectangle + 4)
        of_channel = noise_ptr + first.to(tl.int64) + channel.to(tl.int64) * (rows * columns)
        noise = tl.load(of_channel + from_top * columns + from_left, mask=inside, other=0.0)
        x = tl.where(inside, noise.to(tl.float32), x)
    return x


@triton.jit
def _within(rectangle_ptr, place, width):
    """Whether pixels lie in a rectangle (top, left, height, width), and their rows and columns in it."""
    from_top = place // width - tl.load(rectangle_ptr)
    from_left = place % width - tl.load(rectangle_ptr + 1)
    rows, columns = tl.load(rectangle_ptr + 2), tl.load(rectangle_ptr + 3)
    inside = (from_top >= 0) & (from_top < rows) & (from_left >= 0) & (from_left < columns)
    return inside, from_top, from_left


def normalise_pixels(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    erased: Tensor | None,
    noise: Tensor | None,
    shares: Tensor | None,
    boxes: Tensor | None,
) -> Tensor:
    """Pixels [B, C, H, W] in `dtype` of uint8 images [B, C, H, W].

    mean, std: [C], float32; erased: [B, R, 5] and boxes: [B, 4], int32; noise: [N] and shares: [B, 2], floating-point.
    """
    pixels = torch.empty(images.shape, dtype=dtype, device=images.device)
    batch, channels, height, width = images.shape
    area = height * width
    if pixels.numel() == 0:
        return pixels
    run.run(
        normalise_pixels_kernel,
        batch * channels * triton.cdiv(area, _BLOCK),
        images.device,
        images.contiguous(),
        *map(dense, (mean, std, erased, noise, shares, boxes)),
        pixels,
        batch,
        channels,
        area,
        width,
        RECTANGLES=0 if erased is None else erased.shape[1],
        BLOCK=_BLOCK,
        num_warps=_WARPS,
        # A product is rounded before it is added, as timm's are.
        enable_fp_fusion=False,
    )
    return pixels
