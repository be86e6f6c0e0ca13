"""Parameter names of the original repository and of transformers, to timm's, which are ours."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# The original repository has timm's names but for DeiT III's LayerScale.
_ORIGINAL = ((r"(blocks\.\d+)\.gamma_([12])", r"\1.ls\2.gamma"),)

# transformers renamed its modules in 5.x and goes on writing the names from before: (?:before|since).
_LAYER = r"(?:encoder\.layer|layers)\.(\d+)\."
_TRANSFORMERS = (
    (r"embeddings\.cls_token", r"cls_token"),
    (r"embeddings\.distillation_token", r"dist_token"),
    (r"embeddings\.position_embeddings", r"pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (_LAYER + r"layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (_LAYER + r"layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (_LAYER + r"attention\.(?:attention\.query|q_proj)\.(\w+)", r"blocks.\1.attn.q.\2"),
    (_LAYER + r"attention\.(?:attention\.key|k_proj)\.(\w+)", r"blocks.\1.attn.k.\2"),
    (_LAYER + r"attention\.(?:attention\.value|v_proj)\.(\w+)", r"blocks.\1.attn.v.\2"),
    (_LAYER + r"attention\.(?:output\.dense|o_proj)\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (_LAYER + r"(?:output\.dense|mlp\.fc2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"layernorm\.(\w+)", r"norm.\1"),
    (r"(?:cls_)?classifier\.(\w+)", r"head.\1"),
    (r"distillation_classifier\.(\w+)", r"head_dist.\1"),
)


# What torch.compile and DistributedDataParallel put before a name, in the orders that timm knows.
_WRAPPERS = r"^(?:_orig_mod\.)?(?:module\.)?(?:_orig_mod\.)?"


class Entry(NamedTuple):
    """A tensor of a checkpoint and what the file calls it."""

    source: str
    tensor: Tensor


def to_timm_names(state_dict: Mapping[str, Tensor]) -> dict[str, Entry]:
    """The tensors of a state dict of timm, the original repository or transformers, by timm's names.

    The prefixes of wrappers (`module.`, `_orig_mod.`) are taken off, and `model.` where all names have it, as those
    of a Lightning module do. Separate q, k and v become one qkv, [3·D, D] or [3·D]. Names that no library of the
    three uses stay as they are; so does a second claim to the same name. transformers' `pooler`, which no classifier
    of these reads, is left out.
    """
    transformers = any("embeddings.patch_embeddings." in name for name in state_dict)
    entries: dict[str, Entry] = {}
    for (source, tensor), bare in zip(state_dict.items(), _unwrapped(list(state_dict)), strict=True):
        bare = re.sub(r"^(?:deit|vit)\.", "", bare) if transformers else bare
        if transformers and bare.startswith("pooler."):
            continue
        name = _rename(bare, _TRANSFORMERS if transformers else _ORIGINAL)
        entries[source if name in entries else name] = Entry(source, tensor)
    return _merge_qkv(entries)


def _unwrapped(names: list[str]) -> list[str]:
    names = [re.sub(_WRAPPERS, "", name) for name in names]
    if names and all(name.startswith("model.") for name in names):
        return _unwrapped([name.removeprefix("model.") for name in names])
    return names


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return name


def _merge_qkv(entries: dict[str, Entry]) -> dict[str, Entry]:
    """q, k and v of one layer, when all three are there and alike, in the place of q."""
    merged: dict[str, Entry] = {}
    for name, entry in entries.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn)\.([qkv])\.(\w+)", name)
        names = [f"{match[1]}.{letter}.{match[3]}" for letter in "qkv"] if match else []
        parts = [entries[each] for each in names if each in entries]
        if match is None or len(parts) < 3 or not entry.tensor.ndim or len({part.tensor.shape for part in parts}) > 1:
            merged[name] = entry
        elif match[2] == "q":
            sources = " + ".join(part.source for part in parts)
            merged[f"{match[1]}.qkv.{match[3]}"] = Entry(sources, torch.cat([part.tensor for part in parts]))
    return merged
