"""Images of bytes to what a model computes with: normalised, erased, mixed."""

import torch
from torch import Tensor


def normalise_pixels(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype | None = None,
    erased: Tensor | None = None,
    noise: Tensor | None = None,
    shares: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Tensor:
    """x = (u / 255 − mean) / std by channel, then what erases, then what mixes. Result: [B, C, H, W] in mean's dtype.

    - Random erasing (arXiv 1708.04896): rectangle r of image i, (top, left, height, width, first) = erased[i, r], is
      filled with the C · height · width numbers noise[first:], by channel, row and column.
    - mixup (arXiv 1710.09412) pairs image i with image B − 1 − i: λ x_i + (1 − λ) x_{B−1−i}, shares[i] = (λ, 1 − λ).
    - CutMix (arXiv 1905.04899): within boxes[i] = (top, left, height, width) it is x_{B−1−i}.

    images: [B, C, H, W], uint8; mean, std: [C]; erased: [B, R, 5], int32; noise: [N]; shares: [B, 2]; boxes: [B, 4],
    int32. dtype is what an operator rounds to; here nothing is rounded.
    """
    pixels = (images.to(mean.dtype) / 255 - mean[:, None, None]) / std[:, None, None]
    if erased is not None:
        for image, rectangles in zip(pixels, erased.tolist(), strict=True):
            for top, left, height, width, first in rectangles:
                region = image[:, top : top + height, left : left + width]
                region.copy_(noise[first : first + region.numel()].view(region.shape))
    partners = pixels.flip(0)
    if shares is not None:
        own, other = shares.T[:, :, None, None, None]
        pixels = own * pixels + other * partners
    if boxes is not None:
        pixels = pixels.clone()
        for image, partner, (top, left, height, width) in zip(pixels, partners, boxes.tolist(), strict=True):
            image[:, top : top + height, left : left + width] = partner[:, top : top + height, left : left + width]
    return pixels
