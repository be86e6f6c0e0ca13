"""Position embeddings of one grid of patches resampled to another (ViT, section 3.2), bicubically.

Cubic convolution with its free parameter a: Keys, Cubic Convolution Interpolation for Digital Image
Processing, 1981.
"""

import torch
from torch import Tensor


def interpolate_pos_embed(
    pos_embed: Tensor,
    num_prefix_tokens: int,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    antialias: bool = True,
) -> Tensor:
    """Y = A_h X A_wᵀ on the grid part of pos_embed; the prefix rows stay as they are.

    pos_embed: [1, R + h·w, D] with R = num_prefix_tokens, (h, w) = old_grid;
    result: [1, R + h'·w', D], (h', w') = new_grid.
    antialias: True is timm's choice (a = −0.5, the kernel widened when shrinking), False that of transformers
    (a = −0.75, border positions repeated).
    """
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = grid.unflatten(1, old_grid)
    rows, columns = (resize_matrix(old, new, antialias).to(grid) for old, new in zip(old_grid, new_grid, strict=True))
    grid = torch.einsum("yh,xw,bhwd->byxd", rows, columns, grid)
    return torch.cat([prefix, grid.flatten(1, 2)], dim=1)


def resize_matrix(old: int, new: int, antialias: bool) -> Tensor:
    """A [new, old], float64, such that y = A x resamples `old` equidistant values to `new`.

    Pixel centres are aligned: output i sits at c_i = (i + 1/2) · old/new − 1/2 on the input's axis, and
    A_ij ∝ k((j − c_i) / max(old/new, 1)) with rows that sum to 1 (antialiased), or A_ij = k(j − c_i) with
    positions beyond the border moved onto it (not antialiased).
    """
    ratio = old / new
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * ratio - 0.5
    if antialias:
        positions = torch.arange(old, dtype=torch.float64)
        weights = cubic_kernel((positions - centres[:, None]) / max(ratio, 1.0), a=-0.5)
        return weights / weights.sum(dim=1, keepdim=True)
    positions = centres.floor()[:, None] + torch.arange(-1, 3)
    weights = cubic_kernel(positions - centres[:, None], a=-0.75)
    return torch.zeros(new, old, dtype=torch.float64).scatter_add(1, positions.clamp(0, old - 1).long(), weights)


def cubic_kernel(t: Tensor, a: float) -> Tensor:
    """k(t) = (a+2)|t|³ − (a+3)|t|² + 1 for |t| ≤ 1,  a|t|³ − 5a|t|² + 8a|t| − 4a for 1 < |t| < 2,  0
    beyond."""
    t = t.abs()
    inner = ((a + 2) * t - (a + 3)) * t * t + 1
    outer = a * (((t - 5) * t + 8) * t - 4)
    return torch.where(t <= 1, inner, torch.where(t < 2, outer, torch.zeros_like(t)))
