"""Position embeddings of one grid of patches for another."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def resample_pos_embed(pos_embed: Tensor, num_prefix_positions: int, grid_size: int) -> Tensor:
    """Bicubic interpolation to a square grid, antialiased and in float32: what timm does.

    Args:
        pos_embed: [1, R + g², D]; anything else comes back as it is, for the caller's check of shapes.
        num_prefix_positions: R, the rows before the grid's; they are kept.
        grid_size: patches along one side of the wanted grid.

    Returns:
        [1, R + grid_size², D] in pos_embed's dtype.
    """
    if pos_embed.ndim != 3 or pos_embed.shape[1] <= num_prefix_positions:
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_positions], pos_embed[:, num_prefix_positions:]
    old_size = math.isqrt(grid.shape[1])
    if old_size == grid_size or old_size**2 != grid.shape[1]:
        return pos_embed
    grid = grid.float().unflatten(1, (old_size, old_size)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bicubic", antialias=True)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, grid], dim=1)
