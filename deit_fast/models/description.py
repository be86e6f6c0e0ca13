"""Which model a checkpoint holds, in its own words: JSON in the metadata of the safetensors file."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from deit_fast.models.config import DeiTConfig

_KEY = "deit_fast"


class Description(NamedTuple):
    """The configuration, and the settings of a `DeiTImageProcessor` where images need other than the usual ones."""

    config: DeiTConfig
    image_processor: dict[str, Any] | None


def to_metadata(config: DeiTConfig, image_processor: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What to give safetensors' `save_file(…, metadata=…)`, so that `load_model` and `deit-fast predict` know it.

    image_processor: of `DeiTImageProcessor.to_dict()`.
    """
    return {_KEY: json.dumps({"config": asdict(config), "image_processor": image_processor})}


def read_description(path: str | os.PathLike) -> Description | None:
    """What `to_metadata` put into this file; None where nothing did, and for other kinds of checkpoint.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no safetensors file, or a description that is none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix != ".safetensors" or path.is_dir():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: truncated, or another kind of file") from error
    if _KEY not in metadata:
        return None
    try:
        content = json.loads(metadata[_KEY])
        config, image_processor = DeiTConfig(**content["config"]), content["image_processor"]
        if not isinstance(image_processor, dict | None):
            raise TypeError(f"image_processor is a {type(image_processor).__name__}, not an object")
        return Description(config, image_processor)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: the description of the model in its metadata is broken: {error}") from error
