"""Which model a checkpoint holds: by its own words where it has some, else by the shapes of its tensors."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from deit_fast.models.checkpoint import TRANSFORMERS_DEFAULTS, WEIGHTS, Checkpoint, follow_config, misfits
from deit_fast.models.config import DeiTConfig
from deit_fast.models.deit import VisionTransformer
from deit_fast.models.description import read_description
from deit_fast.models.key_maps import Entry, to_timm_names
from deit_fast.models.registry import get_config, list_models

# Their shapes, with as many dimensions, tell the sizes of a model.
_TELLING = {"patch_embed.proj.weight": 4, "cls_token": 3, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
_HEAD_WIDTH = 64
# What timm's models may be given that another computation, with the same tensors, follows from.
_UNSEEN = ("act_layer", "norm_layer", "attn_layer", "mlp_layer", "block_fn")


def inspect(checkpoint: Checkpoint, num_heads: int | None = None) -> tuple[DeiTConfig, dict[str, Tensor], list[str]]:
    """A checkpoint's configuration, its tensors by timm's names, and what had to be assumed.

    num_heads: where the checkpoint doesn't say it; by default that of the known models of its size, else one for every
    64 of the width.

    Raises:
        ValueError: it is no DeiT (the message lists every missing, unexpected and misshapen key), or of a model that
            isn't computed as one, or says other heads than `num_heads`.
    """
    entries = to_timm_names(checkpoint.state_dict)
    config, assumed = _config(checkpoint, entries, num_heads)
    config = follow_config(config, checkpoint)
    expected = {name: each.shape for name, each in VisionTransformer(config, device="meta").state_dict().items()}
    if problems := misfits(expected, entries):
        raise ValueError("\n  ".join([f"{checkpoint.path} holds no DeiT that is known:", *problems]))
    return config, {name: entry.tensor for name, entry in entries.items()}, assumed


def known_as(config: DeiTConfig) -> str | None:
    """The name of the model that `config` is, whatever its images and classes."""
    parts = ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio", "distilled", "no_embed_class")

    def kind(config: DeiTConfig) -> tuple:
        return *(getattr(config, part) for part in parts), config.init_values is None

    of_kind = [name for name in list_models() if kind(get_config(name)) == kind(config)]
    return next((name for name in of_kind if get_config(name).img_size == config.img_size), next(iter(of_kind), None))


def _config(
    checkpoint: Checkpoint, entries: Mapping[str, Entry], num_heads: int | None
) -> tuple[DeiTConfig, list[str]]:
    path = checkpoint.path
    file = path / WEIGHTS if path.is_dir() else path
    description = read_description(file) if file.exists() else None
    if description is not None:
        _refuse_other_heads(checkpoint, description.config.num_heads, num_heads)
        return description.config, []

    shapes = {name: tuple(entry.tensor.shape) for name, entry in entries.items()}
    if lacking := [name for name, ndim in _TELLING.items() if len(shapes.get(name, ())) != ndim or 0 in shapes[name]]:
        raise ValueError(f"{path} holds no DeiT: it has no {', '.join(lacking)} as DeiTs have")
    width, in_chans, patch_size, _ = shapes["patch_embed.proj.weight"]
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    distilled, positions = "dist_token" in shapes, shapes["pos_embed"][1]

    said_heads, said_size = _said(checkpoint.config or {})
    _refuse_other_heads(checkpoint, said_heads, num_heads)
    heads, assumed = num_heads or said_heads, []
    if heads is None:
        heads, as_what = _usual_heads(width, depth, patch_size)
        assumed = [f"{heads} attention heads, {as_what}: the checkpoint doesn't say how many"]
    prefix = 2 if distilled else 1
    config = DeiTConfig(
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        img_size=said_size or _square(checkpoint, positions, prefix) * patch_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=(shapes.get("head.weight") or (0,))[0],
        mlp_ratio=_ratio(shapes["blocks.0.mlp.fc1.weight"][0], width),
        distilled=distilled,
        init_values=1e-6 if "blocks.0.ls1.gamma" in shapes else None,
    )
    return replace(config, no_embed_class=positions == config.num_patches), assumed


def _said(config: dict[str, Any]) -> tuple[int | None, Any]:
    """Attention heads and image size by a folder's config.json, of transformers or timm."""
    if "model_type" in config:
        config = TRANSFORMERS_DEFAULTS | config
        return config["num_attention_heads"], config.get("image_size", 224)
    arguments, preprocessing = (config.get(key) or {} for key in ("model_args", "pretrained_cfg"))
    if unseen := [name for name in _UNSEEN if arguments.get(name)]:
        raise ValueError(f"{config.get('architecture')} with its own {', '.join(unseen)} may compute something else")
    heads = arguments.get("num_heads")
    size = arguments.get("img_size") or (preprocessing.get("input_size") or ())[1:]
    if heads is None and config.get("architecture") in list_models():
        heads = get_config(config["architecture"]).num_heads
    return heads, size


def _refuse_other_heads(checkpoint: Checkpoint, said: int | None, wanted: int | None) -> None:
    if wanted is not None and said not in (None, wanted):
        raise ValueError(f"{checkpoint.path} has {said} attention heads by its own words, and {wanted} are asked for")


def _usual_heads(width: int, depth: int, patch_size: int) -> tuple[int, str]:
    for config in map(get_config, list_models()):
        if (config.embed_dim, config.depth, config.patch_size) == (width, depth, patch_size):
            return config.num_heads, "as the known models of this size have"
    if width % _HEAD_WIDTH:
        raise ValueError(
            f"the checkpoint doesn't say how many attention heads it has, and its width {width} is no multiple of "
            f"{_HEAD_WIDTH}: give their number"
        )
    return width // _HEAD_WIDTH, f"one for every {_HEAD_WIDTH} of the width {width}"


def _ratio(hidden: int, width: int) -> float:
    """Which times `width`, rounded down, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _square(checkpoint: Checkpoint, positions: int, prefix: int) -> int:
    """Patches along a side."""
    for patches in (positions - prefix, positions):
        side = math.isqrt(max(patches, 0))
        if side and side**2 == patches:
            return side
    raise ValueError(
        f"{checkpoint.path} doesn't say for which images its {positions} positions are; they are no square's"
    )
