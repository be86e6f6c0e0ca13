"""Images to the finished token sequence (ViT, equation 1; DeiT, section 4 for the distillation token)."""

import torch
from torch import Tensor


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
    """[cls_token; dist_token; E x_1; …; E x_P] + positions, x_i the i-th patch in row-major order.

    A convolution whose stride is its kernel's size is one matrix product: each patch flattened as (channel,
    row, column) against the flattened kernel.

    - `mask`: where True the patch's embedding is replaced by `mask_token`, before its position is added
      (BEiT, arXiv 2106.08254).
    - uint8 images stand for x = (u / 255 − mean) / std by channel. This can be folded into weight and bias:
      E x + b = Σ E/(255·std) u + (b − Σ E·mean/std).
    - `pos_embed` of P rows belongs to the patches alone (DeiT III: the prefix tokens have no position), one
      of R + P rows to the whole sequence.

    images: [B, C, Hi, Wi], floating or uint8; weight E: [D, C, p, p]; bias: [D];
    pos_embed: [1, P, D] or [1, R+P, D]; cls_token, dist_token, mask_token: [1, 1, D];
    mask: [B, P] bool; mean, std: [C]; result: [B, R+P, D] in weight's dtype,
    P = (Hi/p)(Wi/p), R the number of prefix tokens given.
    """
    if images.dtype == torch.uint8:
        pixels = images.to(weight.dtype) / 255
        images = (pixels - mean[:, None, None]) / std[:, None, None]

    batch, channels, height, width = images.shape
    rows, columns = weight.shape[2:]
    patches = images.reshape(batch, channels, height // rows, rows, width // columns, columns)
    tokens = torch.einsum("bcyixj,dcij->byxd", patches, weight).flatten(1, 2)
    if bias is not None:
        tokens = tokens + bias
    if mask is not None:
        tokens = torch.where(mask[:, :, None], mask_token, tokens)

    prefix = [token.expand(batch, -1, -1) for token in (cls_token, dist_token) if token is not None]
    if pos_embed is not None and pos_embed.shape[1] == tokens.shape[1]:
        return torch.cat([*prefix, tokens + pos_embed], dim=1)
    tokens = torch.cat([*prefix, tokens], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed
