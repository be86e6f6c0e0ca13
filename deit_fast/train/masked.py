"""Masked image modelling as transformers' DeiTForMaskedImageModeling defines it (SimMIM, arXiv 2111.09886)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedImages(nn.Module):
    """An encoder, and what fills in the masked squares of images after it.

    A share `mask_ratio` of each image's squares of `mask_patch_size` pixels, rounded up, is masked at each call;
    torch's generator draws which.

    Raises:
        ValueError: the encoder is no ViT of timm, or squares that don't divide its images or don't hold whole patches.
    """

    def __init__(self, encoder: Any, mask_ratio: float, mask_patch_size: int):
        super().__init__()
        if not hasattr(encoder, "blocks") or not hasattr(encoder, "patch_embed"):
            raise ValueError(f"masked image modelling needs a ViT, got {type(encoder).__name__}")
        self.grid, patch = encoder.patch_embed.grid_size, encoder.patch_embed.patch_size[0]
        self.along = mask_patch_size // patch  # patches along a square
        if mask_patch_size % patch or self.along == 0 or any(side % self.along for side in self.grid):
            pixels = " x ".join(str(side * patch) for side in self.grid)
            raise ValueError(
                f"mask_patch_size {mask_patch_size} must divide the image's {pixels} pixels, and the patch's {patch} "
                f"must divide it"
            )
        self.mask_ratio, self.patch = mask_ratio, patch
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        channels = encoder.patch_embed.proj.in_channels
        projection = nn.Conv2d(encoder.embed_dim, channels * patch**2, 1)
        nn.init.trunc_normal_(projection.weight, std=0.02)
        nn.init.zeros_(projection.get_parameter("bias"))
        self.decoder = nn.Sequential(projection, nn.PixelShuffle(patch))

    def no_weight_decay(self) -> set[str]:
        """For timm's optimizers."""
        return {"mask_token", *(f"encoder.{name}" for name in self.encoder.no_weight_decay())}

    def masks(self, images: int) -> Tensor:
        """Which patches are masked: [images, rows, columns], bool."""
        rows, columns = (side // self.along for side in self.grid)
        drawn = torch.rand(images, rows * columns, device=self.mask_token.device)
        squares = drawn.argsort(1) < math.ceil(self.mask_ratio * rows * columns)
        squares = squares.view(images, rows, columns)
        return squares.repeat_interleave(self.along, 1).repeat_interleave(self.along, 2)

    def forward(self, images: Tensor) -> Tensor:
        """The loss of each image, [B]: mean absolute error over the masked pixels. images: [B, C, H, W]."""
        masks = self.masks(len(images))
        filled = self.filled(images, masks)
        pixels = masks.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2).unsqueeze(1)
        errors = F.l1_loss(filled.float(), images.float(), reduction="none") * pixels
        return errors.sum((1, 2, 3)) / (pixels.sum((1, 2, 3)) * images.shape[1])

    def filled(self, images: Tensor, masks: Tensor) -> Tensor:
        """What the model makes of images whose patches are masked by `masks`: all pixels, [B, C, H, W]."""
        encoder = self.encoder
        x = encoder.patch_embed(images)
        x = torch.where(masks.flatten(1).unsqueeze(-1), self.mask_token.to(x.dtype), x)
        # From here as timm's forward_features.
        x = encoder.norm(encoder.blocks(encoder.norm_pre(encoder.patch_drop(encoder._pos_embed(x)))))
        patches = x[:, encoder.num_prefix_tokens :].mT
        return self.decoder(patches.reshape(len(images), -1, *self.grid))
