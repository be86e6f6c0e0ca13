"""Parameter names of the original repository and of transformers, to timm's, which are ours, and back."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Rules = tuple[tuple[str, str], ...]

# The original repository has timm's names but for DeiT III's LayerScale.
_ORIGINAL: Rules = ((r"(blocks\.\d+)\.gamma_([12])", r"\1.ls\2.gamma"),)
_TO_ORIGINAL: Rules = ((r"(blocks\.\d+)\.ls([12])\.gamma", r"\1.gamma_\2"),)

# timm's name: transformers' from before 5.x, which it goes on writing, and since where it is another.
_IN_MODEL = {
    "cls_token": ("embeddings.cls_token",),
    "dist_token": ("embeddings.distillation_token",),
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "norm": ("layernorm",),
    "head": ("classifier", "cls_classifier"),
    "head_dist": ("distillation_classifier",),
}
_IN_LAYER = {
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "attn.q": ("attention.attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}


def _any_of(names: tuple[str, ...]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})"


_TRANSFORMERS: Rules = (
    *((rf"{_any_of(theirs)}((?:\.\w+)?)", rf"{ours}\1") for ours, theirs in _IN_MODEL.items()),
    *(
        (rf"(?:encoder\.layer|layers)\.(\d+)\.{_any_of(theirs)}\.(\w+)", rf"blocks.\1.{ours}.\2")
        for ours, theirs in _IN_LAYER.items()
    ),
)


_TO_TRANSFORMERS: Rules = (
    *((rf"{re.escape(ours)}((?:\.\w+)?)", rf"{theirs[0]}\1") for ours, theirs in _IN_MODEL.items()),
    *(
        (rf"blocks\.(\d+)\.{re.escape(ours)}\.(\w+)", rf"encoder.layer.\1.{theirs[0]}.\2")
        for ours, theirs in _IN_LAYER.items()
    ),
)
_DISTILLED_HEAD: Rules = ((r"head\.(\w+)", r"cls_classifier.\1"),)

# Below the model's own name, of transformers 4's TensorFlow classes: Keras's names for parameters, and lists of layers.
_TENSORFLOW: Rules = ((r"(.*)\.(?:kernel|gamma)", r"\1.weight"), (r"(.*)\.beta", r"\1.bias"))

# A module of transformers, as its checkpoints name it and as its models have it since 5.x.
_TO_MODULES: Rules = tuple(
    (rf"(.*\b)encoder\.layer\.(\d+)\.{re.escape(theirs[0])}\.(\w+)", rf"\1layers.\2.{theirs[-1]}.\3")
    for theirs in _IN_LAYER.values()
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


def _rename(name: str, rules: Rules) -> str:
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


def to_original_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those of the original repository."""
    return {_rename(name, _TO_ORIGINAL): tensor for name, tensor in state_dict.items()}


def to_transformers_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those that transformers writes: of DeiT where there is a distillation token, else of ViT.

    LayerScale, which neither has, keeps its name.
    """
    distilled = "dist_token" in state_dict
    rules, backbone = ((*_DISTILLED_HEAD, *_TO_TRANSFORMERS), "deit.") if distilled else (_TO_TRANSFORMERS, "vit.")
    return {
        ("" if part.startswith("head") else backbone) + _rename(part, rules): values
        for name, tensor in state_dict.items()
        for part, values in _split_qkv(name, tensor)
    }


def _split_qkv(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What `_merge_qkv` has put together."""
    before, packed, after = name.partition(".attn.qkv.")
    if not packed:
        yield name, tensor
        return
    for letter, part in zip("qkv", tensor.chunk(3), strict=True):
        yield f"{before}.attn.{letter}.{after}", part


def from_tensorflow(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one of transformers 4's TensorFlow classes, by the names and in the layouts of its PyTorch ones.

    weights: by the names in an h5 file (`deit/tf_dei_t_model/deit/embeddings/cls_token:0`), or in a shard or a
    safetensors file, which have no model's name before them. Kernels are [in, out], and of convolutions
    [height, width, in, out].
    """
    return {_from_tensorflow(name): _torch_layout(name, tensor) for name, tensor in weights.items()}


def _from_tensorflow(name: str) -> str:
    parts = name.removesuffix(":0").split("/")
    if len(parts) > 2 and parts[0] == parts[2]:  # in a file of one piece: the layer, the model, the layer again
        parts = parts[2:]
    return _rename(".".join(parts).replace(".layer_._", ".layer."), _TENSORFLOW)


def _torch_layout(name: str, tensor: Tensor) -> Tensor:
    if not name.removesuffix(":0").endswith("/kernel"):
        return tensor
    return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.mT if tensor.ndim == 2 else tensor


def to_transformers_modules(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint of transformers' DeiT, of any release, by the names that its models have today.

    The encoder's bear the prefix `deit.`, as in the models around it.
    """
    bare = not any(name.startswith("deit.") for name in state_dict)
    return {_rename(f"deit.{name}" if bare else name, _TO_MODULES): tensor for name, tensor in state_dict.items()}
