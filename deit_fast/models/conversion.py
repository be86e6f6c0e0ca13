"""Checkpoints from one library's layout to another's: the same tensors, bit for bit, by other names."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from deit_fast.models.checkpoint import WEIGHTS, load_checkpoint
from deit_fast.models.config import DeiTConfig
from deit_fast.models.description import to_metadata
from deit_fast.models.files import whole
from deit_fast.models.inspection import inspect, known_as
from deit_fast.models.key_maps import to_original_names, to_transformers_names

LAYOUTS = ("timm", "transformers", "original")
_CONFIG = "config.json"
# What timm and the original repository compute with, and can't be told otherwise in a file.
_THEIR_EPS = 1e-6


class Converted(NamedTuple):
    """notes: what had to be assumed, and what the target can't say."""

    config: DeiTConfig
    notes: list[str]


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    layout: str,
    num_heads: int | None = None,
    force: bool = False,
) -> Converted:
    """Write the weights of `source`, whatever `load_checkpoint` reads, as one of `LAYOUTS`.

    Args:
        target: for timm, a folder that it loads by `local-dir:`; for transformers, one for `from_pretrained`; for
            the original repository's names, a `.safetensors` file, or a `.pth` as its scripts read. It is whole or
            not there; each safetensors file says which model it holds.
        num_heads: where the source doesn't say it, see `inspect`.
        force: whether `target` may be replaced, if it is what this function writes.

    Raises:
        ValueError: another layout, a target of another kind, a source that is no DeiT, or one that the layout
            can't hold.
        FileExistsError: `target` is there.
        FileNotFoundError: `source` isn't.
        OSError: it could not be written; what was there before still is.
    """
    target = Path(target)
    _check_target(target, layout, force)
    config, tensors, notes = inspect(load_checkpoint(source), num_heads)
    _refuse_lossy(config, layout)
    # Of their own: neither format takes views of one tensor well.
    state_dict = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in _NAMES[layout](tensors).items()
    }
    if layout != "transformers" and config.layer_norm_eps != _THEIR_EPS:
        notes = [*notes, f"LayerNorm's epsilon is {config.layer_norm_eps:g}; {layout} computes with {_THEIR_EPS:g}"]
    with whole(target) as place:
        if layout in _CONFIGS:
            place.mkdir()
            (place / _CONFIG).write_text(json.dumps(_CONFIGS[layout](config), indent=2) + "\n")
            place = place / WEIGHTS
        if target.suffix == ".pth":
            torch.save({"model": state_dict}, place)
        else:
            save_file(state_dict, place, metadata={"format": "pt", **to_metadata(config)})
    return Converted(config, notes)


def _check_target(target: Path, layout: str, force: bool) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    is_file = target.suffix in (".safetensors", ".pth")
    if is_file != (layout == "original"):
        wanted = "a .safetensors or .pth file" if layout == "original" else "a folder"
        raise ValueError(f"the target for {layout} is {wanted}, got {target}")
    if not os.path.lexists(target):
        return
    if not force:
        raise FileExistsError(f"{target} is there already")
    if target.is_dir() == is_file:
        raise FileExistsError(f"{target} is {'a folder' if target.is_dir() else 'a file'}, and stays")
    if others := {path.name for path in target.iterdir()} - {WEIGHTS, _CONFIG} if target.is_dir() else ():
        raise FileExistsError(f"{target} holds more than a checkpoint, and stays: {', '.join(sorted(others))}")


def _refuse_lossy(config: DeiTConfig, layout: str) -> None:
    """
    Raises:
        ValueError: the library has no such model.
    """
    if layout == "transformers":
        if config.init_values is not None:
            raise ValueError("transformers' DeiT and ViT have no LayerScale, and this model has")
        if config.no_embed_class:
            raise ValueError("transformers' DeiT and ViT have a position for each token, this model for patches alone")
    elif config.distilled and config.no_embed_class:
        raise ValueError(f"{layout} has no distilled model with positions for the patches alone")


def _timm_config(config: DeiTConfig) -> dict[str, Any]:
    """As timm's `save_for_hf` writes it: an architecture, and the arguments that make this model of it."""
    name = known_as(config) or ("deit_tiny_distilled_patch16_224" if config.distilled else "deit_tiny_patch16_224")
    arguments = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values")
    options = {"no_embed_class": True} if config.no_embed_class else {}
    return {
        "architecture": name,
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": "token",
        "model_args": {argument: getattr(config, argument) for argument in arguments} | options,
        "pretrained_cfg": {
            "num_classes": config.num_classes,
            "input_size": config.input_size,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if config.distilled else "head",
        },
    }


def _transformers_config(config: DeiTConfig) -> dict[str, Any]:
    kind = "DeiT" if config.distilled else "ViT"
    task = "ForImageClassificationWithTeacher" if config.distilled else "ForImageClassification"
    return {
        "architectures": [kind + (task if config.num_classes else "Model")],
        "model_type": kind.lower(),
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "qkv_bias": True,
        "num_labels": config.num_classes,
    }


_NAMES: dict[str, Any] = {"timm": dict, "transformers": to_transformers_names, "original": to_original_names}
_CONFIGS = {"timm": _timm_config, "transformers": _transformers_config}
