"""Checkpoints from files into models: all of it, or one error that says what is wrong with all of it."""

import argparse
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deit_fast._extras import require
from deit_fast.models.config import DeiTConfig
from deit_fast.models.deit import VisionTransformer, init_linear
from deit_fast.models.description import read_description
from deit_fast.models.input_channels import adapt_input_channels
from deit_fast.models.key_maps import Entry, from_tensorflow, to_timm_names
from deit_fast.models.pos_embed import resample_pos_embed

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".h5")  # timm writes .pth.tar, Lightning .ckpt
# Where training checkpoints keep the weights, in the order in which timm looks.
_EMA_KEYS, _KEYS = ("state_dict_ema", "model_ema"), ("state_dict", "model")
_PATCHES = "patch_embed.proj.weight"
WEIGHTS = "model.safetensors"
FOLDER_FILES = (
    WEIGHTS,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "tf_model.h5.index.json",
)
TRANSFORMERS_DEFAULTS: dict[str, Any] = {"num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12}


class Checkpoint(NamedTuple):
    """What a file or a transformers folder holds: tensors by the file's own names, and config.json.

    Those of TensorFlow's files have the names and layouts of transformers' PyTorch models.
    """

    path: Path
    state_dict: dict[str, Tensor]
    config: dict[str, Any] | None


def load_checkpoint(path: str | os.PathLike, use_ema: bool = True) -> Checkpoint:
    """Read a `.safetensors`, `.pth`, `.pth.tar`, `.pt`, `.ckpt`, `.bin` or `.h5` file, or a transformers folder.

    Everything is read on the CPU. An `.h5` file is one that a TensorFlow class of transformers 4 wrote.

    A pickle is read as weights only: no code of it runs. A training checkpoint gives the first that it holds of
    `"state_dict_ema"`, `"model_ema"`, `"state_dict"` and `"model"`, as timm's loader does, and a warning says so
    where that is a moving average beside other weights. use_ema=False passes over the averages.

    Raises:
        FileNotFoundError: nothing there, or a folder without one of its files.
        ValueError: another suffix, a truncated or foreign file, a pickle that asks for more than weights, or
            content that isn't a state dict.
        ImportError: h5py, which reads `.h5` files, is not installed.
    """
    path = Path(path)
    if path.is_dir():
        return Checkpoint(path, _read_folder(path), _read_json(path / "config.json"))
    return Checkpoint(path, _read_file(path, use_ema), None)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    name = next((name for name in FOLDER_FILES if (folder / name).exists()), None)
    if name is None:
        raise FileNotFoundError(f"{folder} holds no weights; looked for {', '.join(FOLDER_FILES)}")
    if not name.endswith(".index.json"):
        return _read_file(folder / name)

    shards = shards_of(folder / name)
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks shards that {name} lists: {', '.join(missing)}")
    state_dict: dict[str, Tensor] = {}
    for shard in shards:
        state_dict.update(_read_file(folder / shard))
    return state_dict


def shards_of(index: Path) -> list[str]:
    """The names of the files beside `index`, a sharded checkpoint's, that hold its tensors.

    Raises:
        ValueError: it is no such index, or a name leads elsewhere.
    """
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no weight_map: it is no index of a sharded checkpoint")
    shards = sorted(set(weight_map.values()))
    # A Windows path ends a name at either slash and at a drive's colon.
    elsewhere = [shard for shard in shards if shard in ("", "..") or PureWindowsPath(shard).name != shard]
    if elsewhere:
        raise ValueError(f"{index} lists shards that are no plain file names: {', '.join(map(repr, elsewhere))}")
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; a transformers folder has one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: truncated, or another kind of file") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _read_file(path: Path, use_ema: bool = True) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix not in SUFFIXES:
        suffixes = ", ".join(SUFFIXES)
        raise ValueError(f"{path} is no checkpoint: expected a file in {suffixes}, or a transformers folder")
    readers = {".safetensors": _read_safetensors, ".h5": _read_h5}
    content = readers.get(path.suffix, _read_pickle)(path)
    return _state_dict_in(content, path, use_ema)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: truncated, or another kind of file") from error
    # transformers 4's TensorFlow classes write this format, too.
    return from_tensorflow(weights) if any("/" in name for name in weights) else weights


def _read_h5(path: Path) -> dict[str, Tensor]:
    h5py = require("h5py", extra="keras")
    weights: dict[str, Tensor] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            # transformers never compressed them: what is smaller than its numbers is made up.
            if item.external or item.is_virtual or item.id.get_storage_size() < item.nbytes:
                raise ValueError(f"{name} isn't all in the file")
            weights[name] = torch.from_numpy(item[()])

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    # h5py has no error of its own. TypeError: an array of something other than numbers.
    except (OSError, TypeError, KeyError, RuntimeError, ValueError, MemoryError) as error:
        raise ValueError(f"{path} is no readable h5 file of weights: truncated, or another kind of file") from error
    return from_tensorflow(weights)


def _read_pickle(path: Path) -> object:
    # The original repository and timm save their training arguments, an inert Namespace, too.
    with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # nearly anything for a foreign file: KeyError, EOFError, OSError, …
            wanted = re.search(r"unsupported global:? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
            if wanted:
                raise ValueError(
                    f"{path} holds more than weights: its pickle asks for {wanted[1]}, which could run any "
                    "code. If you trust it, read it with torch.load(…, weights_only=False) and save its "
                    "state dict"
                ) from error
            raise ValueError(f"{path} is no readable PyTorch checkpoint: truncated, or another kind of file") from error


def _state_dict_in(content: Any, path: Path, use_ema: bool) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        averaged, plain = (
            [key for key in keys if isinstance(content.get(key), Mapping)] for keys in (_EMA_KEYS, _KEYS)
        )
        if use_ema and averaged and plain:
            warnings.warn(
                f"{path} holds trained weights ({plain[0]!r}) and their moving average ({averaged[0]!r}): the average "
                f"is taken, as timm does; use_ema=False takes the others",
                stacklevel=2,
            )
        keys = (averaged if use_ema else []) + plain
        content = content[keys[0]] if keys else content
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    others = [str(key) for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} holds no state dict: these are no tensors: {', '.join(others)}")
    return dict(content)


def follow_config(config: DeiTConfig, checkpoint: Checkpoint) -> DeiTConfig:
    """`config` with what a transformers folder says and its tensors don't show: LayerNorm's epsilon.

    Raises:
        ValueError: the folder's model isn't computed as `config`'s is; the message lists every difference.
    """
    theirs = checkpoint.config
    if theirs is None or "model_type" not in theirs:  # timm's folders have a config.json of another kind
        return config
    theirs = TRANSFORMERS_DEFAULTS | theirs
    expected = {
        "model_type": ("deit", "vit"),
        "num_attention_heads": (config.num_heads,),
        "hidden_act": ("gelu",),
    }
    problems = [
        f"{key} is {theirs[key]!r}, expected {' or '.join(map(repr, values))}"
        for key, values in expected.items()
        if theirs[key] not in values
    ]
    if problems:
        raise ValueError(f"{checkpoint.path / 'config.json'} describes another model: {'; '.join(problems)}")
    return replace(config, layer_norm_eps=theirs["layer_norm_eps"])


def load_weights(
    model: VisionTransformer,
    checkpoint: Checkpoint,
    device: torch.device,
    new_heads: bool = False,
    adapt_channels: bool = False,
) -> None:
    """Move `model`, on the meta device, to `device` with the checkpoint's weights.

    Nothing is touched before every key and shape has been checked.

    Args:
        new_heads: start the heads anew where the checkpoint has none, or none of as many classes; a warning says so.
        adapt_channels: sum, repeat or cut the channels of its patch embedding to the model's, as timm does.

    Raises:
        ValueError: tensors missing, unexpected, misshapen or not floating-point; the message lists all of them.
    """
    config = model.config
    entries = to_timm_names(checkpoint.state_dict)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    heads = {name: entry for name, entry in entries.items() if _of_head(name)}
    renewed = new_heads and config.num_classes > 0 and _have_other_classes(heads, expected)
    if renewed:
        expected = {name: shape for name, shape in expected.items() if not _of_head(name)}
    if renewed or config.num_classes == 0:
        entries = {name: entry for name, entry in entries.items() if name not in heads}
    if "pos_embed" in entries:
        source, pos_embed = entries["pos_embed"]
        grid = _source_grid(config, checkpoint, pos_embed)
        resampled = resample_pos_embed(pos_embed, config.num_prefix_positions, config.grid_size, grid)
        entries["pos_embed"] = Entry(source, resampled)
    if adapt_channels and _PATCHES in entries:
        source, weight = entries[_PATCHES]
        entries[_PATCHES] = Entry(source, adapt_input_channels(weight, config.in_chans))

    problems = misfits(expected, entries)
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(
            f"{checkpoint.path} doesn't fit the model:\n  {lines}{_num_classes_hint(config, expected, entries)}"
        )

    model.to_empty(device=device)
    model.load_state_dict({name: entry.tensor for name, entry in entries.items()}, strict=not renewed)
    if renewed:
        for head in (model.head, model.head_dist):
            if isinstance(head, nn.Linear):
                init_linear(head)
        _warn_of_new_heads(config, checkpoint.path, heads)


def _source_grid(config: DeiTConfig, checkpoint: Checkpoint, pos_embed: Tensor) -> tuple[int, int] | None:
    """Rows and columns of the patches that the checkpoint was made for, where it says so."""
    description = read_description(checkpoint.path)
    if description is not None:
        return description.config.grid_size
    size = (checkpoint.config or {}).get("image_size")
    sides: list[Any] = size if isinstance(size, list) else [size, size]
    if len(sides) == 2 and all(isinstance(side, int) for side in sides):
        return sides[0] // config.patch_size, sides[1] // config.patch_size
    side, patches = math.isqrt(config.num_patches), config.num_patches
    if side**2 == patches and config.grid_size != (side, side) and pos_embed.shape[1:-1] == (config.num_positions,):
        warnings.warn(
            f"{checkpoint.path} doesn't say for which images its {patches} positions are: they are kept for "
            f"{config.img_size} pixels (height, width), and not interpolated from a square of {side} x {side} patches",
            stacklevel=3,
        )
    return None


def _of_head(name: str) -> bool:
    return name.startswith(("head.", "head_dist."))


def _have_other_classes(heads: dict[str, Entry], expected: dict[str, torch.Size]) -> bool:
    """Whether `heads`, if any, are the expected ones but for their number of classes."""
    return all(
        name in expected
        and len(tensor.shape) == len(expected[name])
        and tensor.shape[0] != expected[name][0]
        and tensor.shape[1:] == expected[name][1:]
        for name, (_, tensor) in heads.items()
    )


def _warn_of_new_heads(config: DeiTConfig, path: Path, heads: dict[str, Entry]) -> None:
    found = sorted({len(entry.tensor) for entry in heads.values()})
    of_file = f"heads of {' and '.join(map(str, found))} classes are left out" if found else "has no heads"
    warnings.warn(
        f"{path}: {of_file}; the model's, of {config.num_classes} classes, start at random",
        stacklevel=3,
    )


def misfits(expected: dict[str, torch.Size], entries: dict[str, Entry]) -> list[str]:
    """What of `entries` is not as expected, and what is missing: a line each."""
    missing = [f"missing: {name}, expected {tuple(expected[name])}" for name in expected.keys() - entries.keys()]
    unexpected = [
        f"unexpected: {entry.source}, found {tuple(entry.tensor.shape)}"
        for name, entry in entries.items()
        if name not in expected
    ]
    misshapen = [
        f"misshapen: {entry.source}, expected {tuple(expected[name])}, found {tuple(entry.tensor.shape)}"
        for name, entry in entries.items()
        if name in expected and entry.tensor.shape != expected[name]
    ]
    not_floating = [
        f"not floating-point: {entry.source}, found {entry.tensor.dtype}"
        for entry in entries.values()
        if not entry.tensor.is_floating_point()
    ]
    return sorted(missing) + unexpected + misshapen + not_floating


def _num_classes_hint(config: DeiTConfig, expected: dict[str, torch.Size], entries: dict[str, Entry]) -> str:
    wanted = f"num_classes={config.num_classes} for new heads, or num_classes=0 for none"
    if set(filter(_of_head, expected)) == expected.keys() - entries.keys():
        return f"\nIt has no head: pass {wanted}" if config.num_classes else ""
    head = entries.get("head.weight")
    if head is None or head.tensor.ndim != 2 or len(head.tensor) == config.num_classes:
        return ""
    classes = len(head.tensor)
    return f"\nIts head has {classes} classes, the model {config.num_classes}: pass num_classes={classes}, {wanted}"
