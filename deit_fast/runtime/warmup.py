"""Compiles the kernels of a model's first step before that step."""

from contextlib import nullcontext

import torch
from torch import nn

from deit_fast.runtime.apart import apart
from deit_fast.runtime.step import step


def warmup(
    model: nn.Module,
    batch: int,
    img_size: int | tuple[int, int] | None = None,
    *,
    channels: int | None = None,
    amp: torch.dtype | None = None,
) -> None:
    """Runs `model` once on black images [batch, channels, height, width], as it stands: in training mode with backward.

    Triton compiles a kernel the first time it meets its dtypes and widths: seconds each, minutes for a training step,
    kept in Triton's cache from then on. Afterwards the first step takes as long as the next. The model, its gradients,
    its modes and the random numbers drawn after it are as before; a batch norm's or another buffer's running
    statistics are put back too. It may be called in inference mode or in an autocast block.

    img_size: the model's own where None. channels: of its first convolution where None, and 3 where it has none.
    amp: autocast's dtype, as the steps will run; None leaves autocast as it is.

    Raises:
        ValueError: `batch` is not positive, or the model does not say its image size and none is given.
    """
    if batch < 1:
        raise ValueError(f"deit_fast.warmup: batch must be at least 1, got {batch}")
    height, width = _size(model, img_size)
    channels = _channels(model) if channels is None else channels
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    like = next(model.parameters())
    backward = model.training
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gpus = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), apart():
        autocast = nullcontext() if amp is None else torch.autocast(like.device.type, amp)
        images = torch.zeros(batch, channels, height, width, dtype=like.dtype, device=like.device)
        with autocast:
            step(lambda: model(images), parameters if backward else ())
    for buffer, before in buffers:
        buffer.copy_(before)


def _size(model: nn.Module, img_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if img_size is None:
        # timm's and ours, then transformers'.
        embed, config = getattr(model, "patch_embed", None), getattr(model, "config", None)
        img_size = getattr(embed, "img_size", None) or getattr(config, "image_size", None)
    if img_size is None:
        raise ValueError("deit_fast.warmup: this model does not say its image size; pass img_size")
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return height, width


def _channels(model: nn.Module) -> int:
    """The patch embedding's, which every library makes of convolutions."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
