"""The image processor that a checkpoint is evaluated with."""

import json
import math
from pathlib import Path
from typing import Any

from deit_fast.data.image_processor import DeiTImageProcessor
from deit_fast.data.processor_settings import settings_file
from deit_fast.models.description import read_description

# What every published DeiT was trained with; `DeiTImageProcessor`, like transformers', defaults to 0.5.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# timm's names of Pillow's filters.
_RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}


def image_processor(checkpoint: str | None, img_size: int | tuple[int, int]) -> DeiTImageProcessor:
    """The one saved with the checkpoint, else the evaluation transform that DeiT was published with.

    A saved one for another image size gives its mean and standard deviation only. For an `img_size` (height, width)
    images are resized to 256 / 224 of it, whatever their shape.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    mean: float | tuple[float, ...] = IMAGENET_MEAN
    std: float | tuple[float, ...] = IMAGENET_STD
    saved = saved_image_processor(checkpoint) if checkpoint is not None else None
    if saved is not None:
        if saved.crop_size == {"height": height, "width": width}:
            return saved
        mean, std = saved.image_mean, saved.image_std
    larger = [side * 256 // 224 for side in (height, width)]
    size: Any = {"shortest_edge": larger[0]} if height == width else larger
    return DeiTImageProcessor(size=size, crop_size=(height, width), image_mean=mean, image_std=std)


def saved_image_processor(checkpoint: str) -> DeiTImageProcessor | None:
    """From a folder's file, or from the metadata of a safetensors file."""
    if settings_file(checkpoint) is not None:
        return DeiTImageProcessor.from_pretrained(checkpoint)
    folder_config = Path(checkpoint) / "config.json"
    if folder_config.exists():
        return _timms(json.loads(folder_config.read_text(encoding="utf-8")).get("pretrained_cfg") or {})
    description = read_description(checkpoint)
    if description is None or description.image_processor is None:
        return None
    return DeiTImageProcessor.from_dict(description.image_processor)


def _timms(data_config: dict[str, Any]) -> DeiTImageProcessor | None:
    """As `timm.data.create_transform` prepares square images, by timm's config.json; None where that doesn't say it."""
    try:
        (_, height, width), mean, std = (data_config[name] for name in ("input_size", "mean", "std"))
        resample = _RESAMPLE[data_config["interpolation"]]
        larger = [math.floor(side / data_config["crop_pct"]) for side in (height, width)]
    except KeyError:
        return None
    size: Any = {"shortest_edge": larger[0]} if height == width else larger
    return DeiTImageProcessor(size=size, crop_size=(height, width), resample=resample, image_mean=mean, image_std=std)
