"""The settings of the image processor, checked, and the files that hold them."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deit_fast.data import geometry

if TYPE_CHECKING:
    from typing import Self

CONFIG_NAME = "preprocessor_config.json"
# What transformers' processors of several kinds of input write: the images' settings lie in it.
_COMBINED_NAME, _COMBINED_KEY = "processor_config.json", "image_processor"
# The names under which transformers has written the same settings.
_TYPES = ("DeiTImageProcessor", "DeiTImageProcessorFast", "DeiTImageProcessorPil", "DeiTFeatureExtractor")


class ProcessorSettings:
    """The arguments of `transformers.DeiTImageProcessor`; None switches a step off.

    Raises:
        ValueError: an argument that cannot be used, by its name.
    """

    def __init__(
        self,
        *,
        do_convert_rgb: bool | None = None,
        do_resize: bool | None = True,
        size: Any = 256,
        default_to_square: bool | None = True,
        resample: Any = 3,
        do_center_crop: bool | None = True,
        crop_size: Any = 224,
        do_rescale: bool | None = True,
        rescale_factor: float | None = 1 / 255,
        do_normalize: bool | None = True,
        image_mean: float | list[float] | tuple[float, ...] | None = (0.5, 0.5, 0.5),
        image_std: float | list[float] | tuple[float, ...] | None = (0.5, 0.5, 0.5),
        do_pad: bool | None = None,
        pad_size: Any = None,
        input_data_format: str | None = None,
        data_format: str | None = None,
        return_tensors: str | None = None,
        device: torch.device | str | None = None,
        disable_grouping: bool | None = None,
        image_seq_length: int | None = None,
    ) -> None:
        self.do_convert_rgb = do_convert_rgb
        self.do_resize = do_resize
        self.size = None if size is None else geometry.size_of("size", size, bool(default_to_square))
        self.default_to_square = default_to_square
        self.resample = None if resample is None else geometry.resampling(resample)
        self.do_center_crop = do_center_crop
        self.crop_size = None if crop_size is None else geometry.size_of("crop_size", crop_size)
        self.do_rescale = do_rescale
        self.rescale_factor = None if rescale_factor is None else _nonzero("rescale_factor", rescale_factor)
        self.do_normalize = do_normalize
        self.image_mean: Any = None if image_mean is None else _per_channel("image_mean", image_mean)
        self.image_std: Any = None if image_std is None else _per_channel("image_std", image_std)
        self.do_pad = do_pad
        self.pad_size = None if pad_size is None else geometry.size_of("pad_size", pad_size)
        self.input_data_format = _one_of(
            "input_data_format", input_data_format, ("channels_first", "channels_last", "none")
        )
        self.data_format = _one_of("data_format", data_format, ("channels_first", "channels_last", "none"))
        self.return_tensors = _one_of("return_tensors", return_tensors, ("pt", "np"))
        self.device = None if device is None else str(torch.device(device))
        self.disable_grouping = disable_grouping
        self.image_seq_length = image_seq_length
        self._check_steps()

    def _check_steps(self) -> None:
        """Each step that is on has what it needs."""
        if self.do_resize:
            geometry.require_keys("size", "do_resize", self.size, geometry.RESIZABLE)
        if self.do_center_crop:
            geometry.require_keys("crop_size", "do_center_crop", self.crop_size, (geometry.EXACT,))
        if self.do_pad:
            geometry.require_keys("pad_size", "do_pad", self.pad_size, (geometry.EXACT,))
        for step, needed in (
            ("do_resize", "resample"),
            ("do_rescale", "rescale_factor"),
            ("do_normalize", "image_mean"),
            ("do_normalize", "image_std"),
        ):
            if getattr(self, step) and getattr(self, needed) is None:
                raise ValueError(f"{step} needs {needed}")
        if 0 in np.atleast_1d(self.image_std or 1):
            raise ValueError(f"image_std is {self.image_std!r}; expected numbers other than 0")

    def replace(self, **overrides: Any) -> "Self":
        """The same with other settings.

        Raises:
            TypeError: there is no such setting.
            ValueError: one that cannot be used.
        """
        unknown = sorted(set(overrides) - SETTINGS.keys())
        if unknown:
            raise TypeError(f"unknown arguments {unknown}; expected some of {sorted(SETTINGS)}")
        return type(self)(**{**vars(self), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Every setting under transformers' names, with `image_processor_type`; no None where that is the default."""
        kept = {k: v for k, v in vars(self).items() if v is not None or SETTINGS[k] is not None}
        return {"image_processor_type": "DeiTImageProcessor", **kept}

    def to_json_string(self) -> str:
        """`to_dict` as the text of a configuration file."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json_string` to a file."""
        Path(path).write_text(self.to_json_string(), encoding="utf-8")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> list[str]:
        """Write `preprocessor_config.json`, which transformers reads too, into a folder; return its path."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = os.path.join(folder, CONFIG_NAME)
        self.to_json_file(path)
        return [path]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **overrides: Any) -> "Self":
        """Build from `to_dict`'s dict or transformers'; keys that name no setting are ignored.

        Raises:
            ValueError: settings of another kind of processor, or one that cannot be used.
        """
        kind = config.get("image_processor_type") or config.get("feature_extractor_type")
        if kind is not None and kind not in _TYPES:
            raise ValueError(f"these are settings of a {kind}, whose defaults differ; expected {_TYPES[0]}")
        return cls(**{**{name: config[name] for name in SETTINGS if name in config}, **overrides})

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> "Self":
        """Build from a file that `to_json_file` or transformers' wrote; raises as `from_pretrained` does."""
        return cls.from_pretrained(path)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **overrides: Any) -> "Self":
        """Read the settings in a local folder, as `settings_file` finds them, or in a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not valid JSON, or holds settings that `from_dict` refuses.
        """
        path = settings_file(folder) or Path(folder)
        if not path.is_file():
            raise FileNotFoundError(f"{path / CONFIG_NAME if path.is_dir() else path}: no such file")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_dict(config.get(_COMBINED_KEY, config), **overrides)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if value is not None)
        return f"{type(self).__name__}({settings})"


SETTINGS: dict[str, Any] = dict(ProcessorSettings.__init__.__kwdefaults__ or {})


def settings_file(folder: str | os.PathLike[str]) -> Path | None:
    """The folder's file of image settings, if it has one: `processor_config.json` where they lie in it, as in
    transformers, else `preprocessor_config.json`.

    Raises:
        ValueError: `processor_config.json` is not valid JSON.
    """
    combined, own = Path(folder) / _COMBINED_NAME, Path(folder) / CONFIG_NAME
    if combined.is_file():
        try:
            if _COMBINED_KEY in json.loads(combined.read_text(encoding="utf-8")):
                return combined
        except ValueError as error:
            raise ValueError(f"{combined}: {error}") from error
    return own if own.is_file() else None


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str | None:
    """`value` as a plain string: transformers has enumerations of strings for some."""
    if value is None:
        return None
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {allowed}")
    return str(getattr(value, "value", value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _nonzero(name: str, value: Any) -> float:
    if not _is_number(value) or value == 0:
        raise ValueError(f"{name} is {value!r}; expected a finite number other than 0")
    return float(value)


def _per_channel(name: str, value: Any) -> float | tuple[float, ...]:
    if _is_number(value):
        return float(value)
    if isinstance(value, list | tuple) and value and all(map(_is_number, value)):
        return tuple(map(float, value))
    raise ValueError(f"{name} is {value!r}; expected a finite number, or one a channel")
