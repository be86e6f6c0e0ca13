"""Patch embeddings of images with one number of channels for another."""

import math

import torch
from torch import Tensor


def adapt_input_channels(weight: Tensor, in_chans: int) -> Tensor:
    """What timm does: grey images get the sum over the channels, others the channels repeated or cut.

    Repeated and cut channels are scaled by C / in_chans, so that the patches keep their size on average.

    Args:
        weight: [D, C, p, p]; anything else comes back as it is, for the caller's check of shapes.
        in_chans: the wanted number of channels.

    Returns:
        [D, in_chans, p, p] in weight's dtype.
    """
    if weight.ndim != 4 or weight.shape[1] in (0, in_chans):
        return weight
    channels = weight.shape[1]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if in_chans == 1:
        adapted = wide.sum(dim=1, keepdim=True)
    else:
        adapted = wide.repeat(1, math.ceil(in_chans / channels), 1, 1)[:, :in_chans] * (channels / in_chans)
    return adapted.to(weight.dtype)
