"""From a folder or the hub into a model: all of it, or one error that says what is wrong with all of it."""

import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor
from transformers.models.deit.configuration_deit import DeiTConfig

from deit_fast.models.checkpoint import FOLDER_FILES, Checkpoint, load_checkpoint, misfits, shards_of
from deit_fast.models.key_maps import Entry, to_transformers_modules

# What one class has and another hasn't: a checkpoint is read without them.
_HEADS = (
    "deit.embeddings.mask_token",
    "deit.pooler.",
    "decoder.",
    "classifier.",
    "cls_classifier.",
    "distillation_classifier.",
)
_KERAS = ("dtype", "name", "trainable")
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def split_arguments(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """These keywords in three: where on the hub to look, Keras's, and the configuration's or the class's."""
    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    of_keras = {name: kwargs[name] for name in _KERAS if name in kwargs}
    return hub, of_keras, {name: value for name, value in kwargs.items() if name not in {*hub, *of_keras}}


def read_config(name: str | os.PathLike, hub: dict[str, Any], changes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A checkpoint's configuration with the `changes` that it has names for, and the other ones.

    Raises:
        ValueError: of another architecture.
    """
    found, _ = DeiTConfig.get_config_dict(name, **hub)
    if found.get("model_type") != "deit":
        raise ValueError(f"{name} holds no DeiT: the model_type in its config.json is {found.get('model_type')!r}")
    read: Any = DeiTConfig.from_dict
    return read(found, return_unused_kwargs=True, **changes)


def read_weights(name: str | os.PathLike, hub: dict[str, Any]) -> Checkpoint:
    """The weights in a folder, or of a model on the hub, in any of the formats that `load_checkpoint` reads.

    Raises:
        OSError, ValueError: as `load_checkpoint`, and as transformers where the hub has no such model.
    """
    folder = Path(name) / hub.get("subfolder", "")
    return load_checkpoint(folder if folder.is_dir() else _download(str(name), hub))


def _download(name: str, hub: dict[str, Any]) -> Path:
    """The folder with config.json and the first of FOLDER_FILES that the hub has for the model."""
    hf_hub_download(name, "config.json", **hub)
    unreached = None
    for file_name in FOLDER_FILES:
        try:
            found = Path(hf_hub_download(name, file_name, **hub))
        except LocalEntryNotFoundError as error:  # another may be in the cache
            unreached = error
            continue
        except EntryNotFoundError:
            continue
        if file_name.endswith(".index.json"):
            for shard in shards_of(found):
                hf_hub_download(name, shard, **hub)
        return found.parent
    looked_for = f"looked for {', '.join(FOLDER_FILES)}"
    if unreached is not None:
        raise FileNotFoundError(f"{name}: the hub was not reached, and the cache has no weights; {looked_for}") from (
            unreached
        )
    raise FileNotFoundError(f"{name} on the hub has no weights; {looked_for}")


def load_weights(parameters: Mapping[str, Tensor], checkpoint: Checkpoint, new_heads: bool) -> None:
    """Copies a checkpoint into `parameters`, the names being those of transformers' models around `deit`.

    Heads, pooler and mask token that the checkpoint has not keep their values, at random, and a warning says so;
    what it has and the model has not is left out. Nothing is touched before every name and shape has been checked.

    Args:
        new_heads: the same for heads of other shapes.

    Raises:
        ValueError: tensors missing, unexpected, misshapen or not floating-point; the message lists all of them.
    """
    tensors = to_transformers_modules(checkpoint.state_dict)
    sources = zip(checkpoint.state_dict, tensors.items(), strict=True)
    entries = {name: Entry(source, tensor) for source, (name, tensor) in sources}
    expected = {name: parameter.shape for name, parameter in parameters.items()}
    new = []
    for head in _HEADS:
        theirs, ours = _of(head, entries), _of(head, expected)
        misshapen = any(entries[name].tensor.shape != expected[name] for name in theirs & ours)
        if not theirs or not ours or (new_heads and misshapen):
            new += [head.strip(".")] if ours else []
            for name in theirs | ours:
                entries.pop(name, None)
                expected.pop(name, None)
    if problems := misfits(expected, entries):
        lines = "\n  ".join(problems)
        hint = "" if new_heads else "\nFor a head of other classes: ignore_mismatched_sizes=True starts it anew"
        raise ValueError(f"{checkpoint.path} doesn't fit the model:\n  {lines}{hint}")
    if new:
        warnings.warn(
            f"{checkpoint.path} has no fitting {', '.join(new)} for this model: started at random", stacklevel=3
        )
    with torch.no_grad():
        for name, entry in entries.items():
            parameters[name].copy_(entry.tensor)


def _of(head: str, names: Collection[str]) -> set[str]:
    return {name for name in names if name.startswith(head)}
