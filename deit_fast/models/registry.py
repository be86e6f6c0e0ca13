"""Models by name: timm's names and hyper-parameters.

DeiT: arXiv 2012.12877, table 1; DeiT III: arXiv 2204.07118.
"""

import difflib
import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from deit_fast.models.checkpoint import follow_config, load_checkpoint, load_weights
from deit_fast.models.config import DeiTConfig
from deit_fast.models.deit import VisionTransformer

_TINY: dict[str, Any] = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL: dict[str, Any] = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_MEDIUM: dict[str, Any] = {"embed_dim": 512, "depth": 12, "num_heads": 8}
_BASE: dict[str, Any] = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE: dict[str, Any] = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_HUGE: dict[str, Any] = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14}


def _deit3(size: dict[str, Any], **kwargs: Any) -> DeiTConfig:
    return DeiTConfig(**size, init_values=1e-6, no_embed_class=True, **kwargs)


_CONFIGS = {
    "deit_tiny_patch16_224": DeiTConfig(**_TINY),
    "deit_small_patch16_224": DeiTConfig(**_SMALL),
    "deit_base_patch16_224": DeiTConfig(**_BASE),
    "deit_base_patch16_384": DeiTConfig(**_BASE, img_size=384),
    "deit_tiny_distilled_patch16_224": DeiTConfig(**_TINY, distilled=True),
    "deit_small_distilled_patch16_224": DeiTConfig(**_SMALL, distilled=True),
    "deit_base_distilled_patch16_224": DeiTConfig(**_BASE, distilled=True),
    "deit_base_distilled_patch16_384": DeiTConfig(**_BASE, distilled=True, img_size=384),
    "deit3_small_patch16_224": _deit3(_SMALL),
    "deit3_small_patch16_384": _deit3(_SMALL, img_size=384),
    "deit3_medium_patch16_224": _deit3(_MEDIUM),
    "deit3_base_patch16_224": _deit3(_BASE),
    "deit3_base_patch16_384": _deit3(_BASE, img_size=384),
    "deit3_large_patch16_224": _deit3(_LARGE),
    "deit3_large_patch16_384": _deit3(_LARGE, img_size=384),
    "deit3_huge_patch14_224": _deit3(_HUGE),
}


def list_models() -> list[str]:
    """The names `create_model` knows, sorted."""
    return sorted(_CONFIGS)


def get_config(name: str) -> DeiTConfig:
    """The configuration called `name`.

    Raises:
        ValueError: no such name; the message has the nearest ones.
    """
    if name not in _CONFIGS:
        near = difflib.get_close_matches(name, _CONFIGS, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(list_models())}."
        raise ValueError(f"unknown model {name!r}. {hint}")
    return _CONFIGS[name]


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    drop_path_rate: float = 0.0,
    memory: str = "balanced",
    readout: bool = True,
    compact_drop_path: bool = False,
    checkpoint: str | os.PathLike | None = None,
    use_ema: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VisionTransformer:
    """Build the model called `name`, with weights from `checkpoint` or at random.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the head, 1000 by default. Given a number, a checkpoint's heads of other classes are
            left out, and the new ones start at random; a warning says so. 0 for no head: the model then returns
            features [B, embed_dim].
        img_size: side of square images in pixels, or (height, width); by default the one in the name. Position
            embeddings of a checkpoint with another grid are interpolated, bicubically as timm does.
        in_chans: channels of the images, 3 by default. Given a number, a checkpoint's patch embedding of other
            channels is summed (to 1), repeated or cut and scaled, as timm does.
        drop_path_rate: of the last block in training; it rises linearly from 0 at the first.
        memory, readout, compact_drop_path: as of `deit_fast.swap`.
        checkpoint: a `.safetensors`, `.pth`, `.pth.tar`, `.pt`, `.ckpt` or `.bin` file, or a transformers folder;
            names of the original DeiT repository, timm or transformers, with or without the prefixes of
            `DistributedDataParallel`, `torch.compile` or Lightning. A folder's `config.json` sets LayerNorm's epsilon.
        use_ema: from a training checkpoint that holds them, take the averaged weights, as timm does (and a
            warning says so); False takes the others.
        device, dtype: of the parameters; torch's defaults.

    Raises:
        ValueError: an unknown name (the message has the nearest), an argument out of range, an unreadable
            checkpoint, one for the meta device, or one that doesn't fit (the message lists every missing,
            unexpected and misshapen key).
        FileNotFoundError: `checkpoint`, or a part of it, isn't there.
    """
    asked = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans}
    changes: dict[str, Any] = {field: value for field, value in asked.items() if value is not None}
    config = replace(get_config(name), **changes)
    build = partial(
        VisionTransformer,
        drop_path_rate=drop_path_rate,
        dtype=dtype,
        memory=memory,
        readout=readout,
        compact_drop_path=compact_drop_path,
    )
    if checkpoint is None:
        return build(config, device=device)

    loaded = load_checkpoint(checkpoint, use_ema)
    on = real_device(device)
    # On meta nothing is initialised only to be overwritten, and a checkpoint that doesn't fit costs nothing.
    model = build(follow_config(config, loaded), device="meta")
    load_weights(model, loaded, on, new_heads="num_classes" in changes, adapt_channels="in_chans" in changes)
    return model


def real_device(device: torch.device | str | None) -> torch.device:
    """Where weights are to lie, by default torch's default device.

    Raises:
        ValueError: it has no memory.
    """
    found = torch.get_default_device() if device is None else torch.device(device)
    if found.type == "meta":
        raise ValueError("a checkpoint can't be loaded on the meta device; give a real one, or no checkpoint")
    return found
