"""Images on their way to the model: bytes, and what is erased of them, until they are normalised where the model is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms.functional import pil_to_tensor

from deit_fast import ops
from deit_fast.train.mixing import UNMIXED, Mix


class ByteImages(NamedTuple):
    """A batch of images [B, C, H, W], uint8, and what is erased of them, as `ops.normalise_pixels` takes it.

    erased: [B, R, 5], int32; noise: [N], float32; None where nothing ever is. One image has the same without B.
    """

    images: Tensor
    erased: Tensor | None = None
    noise: Tensor | None = None


class ToBytes:
    """The end of a transform: an image's bytes, and what `erasing` draws for it, as for a normalised image."""

    def __init__(self, erasing: RandomErasing | None = None):
        self.erasing = erasing

    def __call__(self, image: Image.Image) -> ByteImages:
        """image: of 8 bits a channel."""
        pixels = pil_to_tensor(image).contiguous()
        if self.erasing is None:
            return ByteImages(pixels)
        drawn = _Erased(pixels.shape)
        self.erasing(drawn)
        return ByteImages(pixels, *drawn.packed(self.erasing.max_count))


class _Erased:
    """What timm's RandomErasing takes for an image: it remembers what is written into it."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size):
        self.pixels = torch.empty(shape)
        self.regions: list[tuple[slice, slice, slice]] = []

    def size(self) -> torch.Size:
        return self.pixels.shape

    def __setitem__(self, region: tuple[slice, slice, slice], noise: Tensor) -> None:
        self.pixels[region] = noise
        self.regions.append(region)

    def packed(self, most: int) -> tuple[Tensor, Tensor]:
        """Rectangles [most, 5] and noise [N]; where rectangles overlap, each has what was written last."""
        filled = [self.pixels[region] for region in self.regions]
        rectangles, first = torch.zeros(most, 5, dtype=torch.int32), 0
        for i, ((_, rows, columns), noise) in enumerate(zip(self.regions, filled, strict=True)):
            rectangles[i] = torch.tensor([rows.start, columns.start, *noise.shape[1:], first])
            first += noise.numel()
        return rectangles, torch.cat([torch.empty(0), *(noise.flatten() for noise in filled)])


def batched(samples: Sequence[ByteImages]) -> ByteImages:
    """One batch of images of one size."""
    images = default_collate([sample.images for sample in samples])
    erased = [sample.erased for sample in samples if sample.erased is not None]
    noise = [sample.noise for sample in samples if sample.noise is not None]
    if not erased:
        return ByteImages(images)
    rectangles, lengths = torch.stack(erased), torch.tensor([len(each) for each in noise])
    rectangles[..., 4] += (lengths.cumsum(0) - lengths).view(-1, 1)
    length = int(lengths.sum())
    # Few lengths, since launches are remembered by shapes.
    return ByteImages(images, rectangles, F.pad(torch.cat(noise), (0, (1 << length.bit_length()) - length)))


class Normalise:
    """Images [B, C, H, W] in `dtype` on `device` of `ByteImages`, with the numbers of torchvision's Normalize.

    data_config: of `timm.data.resolve_model_data_config`.
    """

    def __init__(self, data_config: dict[str, Any], device: torch.device, dtype: torch.dtype = torch.float32):
        self.mean, self.std = (torch.tensor(data_config[name], device=device) for name in ("mean", "std"))
        self.device, self.dtype = device, dtype

    def __call__(self, byte_images: ByteImages, mix: Mix = UNMIXED) -> Tensor:
        images, *erased = byte_images
        images = images.to(self.device, non_blocking=True)
        rest = [None if each is None else each.to(self.device, non_blocking=True) for each in (*erased, *mix)]
        return ops.normalise_pixels(images, self.mean, self.std, self.dtype, *rest)
