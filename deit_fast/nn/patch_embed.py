"""Image to patch tokens, with timm's constructor, attributes and parameter names."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.nn import guards, parts
from deit_fast.nn.forward import patch_embed_forward

_LAYOUTS = ("NCHW", "NHWC", "NLC")


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (*value,) if isinstance(value, (tuple, list)) else (value, value)


class PatchEmbed(nn.Module):
    """A projection of non-overlapping patches: images [B, C, H, W] → tokens [B, P, D], or a grid.

    `flatten` gives tokens; otherwise `output_fmt` ("NCHW", "NHWC" or "NLC") names the layout. `dynamic_img_pad`
    pads the bottom and right to whole patches.

    Raises:
        ValueError: no such `output_fmt`; with `strict_img_size`, in a call: images of another size than `img_size`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if output_fmt is not None and output_fmt not in _LAYOUTS:
            raise ValueError(f"output_fmt must be one of {', '.join(_LAYOUTS)}, got {output_fmt!r}")
        self.patch_size = _pair(patch_size)
        self._set_grid(img_size)
        self.layout = output_fmt or ("NLC" if flatten else "NCHW")
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.proj = nn.Conv2d(
            in_chans,
            embed_dim,
            self.patch_size,
            stride=self.patch_size,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.norm = norm_layer(embed_dim, device=device, dtype=dtype) if norm_layer else nn.Identity()

    def _set_grid(self, img_size: int | tuple[int, int] | None) -> None:
        self.img_size = self.grid_size = self.num_patches = None
        if img_size is not None:
            self.img_size = _pair(img_size)
            self.grid_size = tuple(side // patch for side, patch in zip(self.img_size, self.patch_size, strict=True))
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Take images of another size from now on.

        Raises:
            ValueError: another patch size than the present one.
        """
        if patch_size is not None and _pair(patch_size) != self.patch_size:
            raise ValueError(
                f"deit_fast.nn.PatchEmbed keeps its patch size {self.patch_size}; resample the weight yourself for "
                f"{_pair(patch_size)}"
            )
        if img_size is not None:
            self._set_grid(img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels a patch, the larger side or both."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
        """The grid that an image of `img_size` gives."""
        rounding = math.ceil if self.dynamic_img_pad else math.floor
        height, width = (rounding(side / patch) for side, patch in zip(img_size, self.patch_size, strict=True))
        return height, width

    def forward(self, images: Tensor) -> Tensor:
        size = tuple(images.shape[2:])
        if self.strict_img_size and self.img_size is not None and size != self.img_size:
            raise ValueError(f"this model takes images of {self.img_size} pixels (height, width), got {size}")
        if self.dynamic_img_pad:
            bottom, right = (-side % patch for side, patch in zip(size, self.patch_size, strict=True))
            images = F.pad(images, (0, right, 0, bottom))
        if guards.patch_embed_unfusable(self) is None:
            tokens = patch_embed_forward(self, images)
        else:
            tokens = self.norm(self.proj(images).flatten(2).transpose(1, 2))
        if self.layout == "NLC":
            return tokens
        grid = tokens.unflatten(1, self.dynamic_feat_size(size))
        return grid if self.layout == "NHWC" else grid.permute(0, 3, 1, 2)


parts.add(parts.PATCH_EMBEDS, PatchEmbed)
