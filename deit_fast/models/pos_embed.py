"""Position embeddings of one grid of patches for another."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def resample_pos_embed(
    pos_embed: Tensor, num_prefix_positions: int, grid_size: tuple[int, int], source: tuple[int, int] | None = None
) -> Tensor:
    """Bicubic interpolation of one grid to another, antialiased and in float32: what timm does.

    Args:
        pos_embed: [1, R + P, D]; anything that is no grid comes back as it is, for the caller's check of shapes.
        num_prefix_positions: R, the rows before the grid's; they are kept.
        grid_size: rows and columns of the wanted grid.
        source: those of the grid in pos_embed. None, or another number of patches: it is the wanted grid where P is
            as many, else a square.

    Returns:
        [1, R + rows · columns, D] in pos_embed's dtype.
    """
    if pos_embed.ndim != 3 or pos_embed.shape[1] <= num_prefix_positions:
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_positions], pos_embed[:, num_prefix_positions:]
    patches = grid.shape[1]
    if source is None or math.prod(source) != patches:
        source = grid_size if patches == math.prod(grid_size) else (math.isqrt(patches),) * 2
    if source == grid_size or math.prod(source) != patches:
        return pos_embed
    grid = grid.float().unflatten(1, source).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=grid_size, mode="bicubic", antialias=True)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, grid], dim=1)
