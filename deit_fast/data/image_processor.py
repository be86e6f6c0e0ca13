"""DeiT's image processor: resize, centre crop, rescale, normalise.

Arguments, defaults and results are those of `transformers.DeiTImageProcessor` (release 5, torchvision
backend). The arithmetic is torch's own, on whatever device the pixels are.
"""

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from deit_fast.data import images as _images

if TYPE_CHECKING:
    import PIL.Image

    Image: TypeAlias = PIL.Image.Image | np.ndarray | torch.Tensor | str | os.PathLike[str]

CONFIG_NAME = "preprocessor_config.json"

# Pillow's numbers for its filters, which is what the configuration file stores.
_INTERPOLATION = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# The names under which transformers has written the same settings.
_TYPES = ("DeiTImageProcessor", "DeiTImageProcessorFast", "DeiTImageProcessorPil", "DeiTFeatureExtractor")


class PixelValues(dict):
    """What a processor returns: a mapping whose one key, `pixel_values`, is an attribute too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, *args: Any, **kwargs: Any) -> "PixelValues":
        """The same with every tensor moved or cast by `torch.Tensor.to(*args, **kwargs)`."""
        return PixelValues({key: value.to(*args, **kwargs) for key, value in self.items()})


class DeiTImageProcessor:
    """Prepares images as `transformers.DeiTImageProcessor` does.

    Steps, each with its `do_…` switch: convert to RGB (off by default), resize to `size` with antialiasing,
    centre crop to `crop_size`, multiply by `rescale_factor`, subtract `image_mean` and divide by `image_std`,
    pad to `pad_size` with zeros at the bottom and the right (off by default).

    The crop starts at row `(height - crop_height) // 2`, columns likewise. Where the crop is larger than the
    image, black fills the difference: `difference // 2` rows above, the rest below, columns likewise.

    Args:
        size: an int, `(height, width)`, `{"height", "width"}`, or `{"shortest_edge"}`, which keeps the aspect
            ratio. An int means a square, or the shortest edge with `default_to_square=False`.
        resample: Pillow's number of the filter: 0 nearest, 1 Lanczos (torch 2.12 on), 2 bilinear, 3 bicubic.
        crop_size, pad_size: an int, `(height, width)` or `{"height", "width"}`.
        image_mean, image_std: one number, or one a channel, in units of the rescaled image (0 to 1).

    Raises:
        ValueError: an argument that cannot be used, by its name.
    """

    def __init__(
        self,
        *,
        do_convert_rgb: bool | None = None,
        do_resize: bool = True,
        size: Any = 256,
        default_to_square: bool = True,
        resample: int = 3,
        do_center_crop: bool = True,
        crop_size: Any = 224,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: float | list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        do_pad: bool | None = None,
        pad_size: Any = None,
    ) -> None:
        if resample not in _INTERPOLATION:
            raise ValueError(
                f"resample is {resample!r}; expected 0 (nearest), 1 (Lanczos), 2 (bilinear) or 3 (bicubic)"
            )
        if do_pad and pad_size is None:
            raise ValueError("do_pad needs pad_size")
        self.do_convert_rgb = do_convert_rgb
        self.do_resize = do_resize
        self.size = _size("size", size, square=default_to_square, shortest_edge=True)
        self.default_to_square = default_to_square
        self.resample = int(resample)
        self.do_center_crop = do_center_crop
        self.crop_size = _size("crop_size", crop_size)
        self.do_rescale = do_rescale
        self.rescale_factor = _nonzero("rescale_factor", rescale_factor)
        self.do_normalize = do_normalize
        self.image_mean = _per_channel("image_mean", image_mean)
        self.image_std = _per_channel("image_std", image_std)
        if 0 in np.atleast_1d(self.image_std):
            raise ValueError(f"image_std is {image_std!r}; expected numbers other than 0")
        self.do_pad = do_pad
        self.pad_size: Any = None if pad_size is None else _size("pad_size", pad_size)

    def __call__(self, images: "Image | Sequence[Image]", **kwargs: Any) -> PixelValues:
        """Same as `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: "Image | Sequence[Image]",
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        device: torch.device | str | None = None,
        **overrides: Any,
    ) -> PixelValues:
        """Prepare one image or a list of images.

        Args:
            images: PIL images, paths, numpy arrays or torch tensors, a batch `[B, …]` of them, or lists.
                Arrays are `[C, H, W]` or `[H, W, C]` with 1, 3 or 4 channels, uint8 or floating point, from 0
                to 255 unless `do_rescale=False`.
            return_tensors: "pt" or "np" for one `[B, C, H, W]`; None for a list of `[C, H, W]` tensors.
            input_data_format: "channels_first" or "channels_last"; by default whichever axis has 1, 3 or 4
                entries, the first where both have.
            device: where to work; by default where each image is.
            overrides: any constructor argument, for this call.

        Returns:
            `.pixel_values`, float32; uint8 where the images were and nothing rescales or normalises them.

        Raises:
            ValueError, TypeError: before any image is processed, for an image of the wrong rank, number of
                channels or dtype, of no pixels or too many, and for images that would not stack.
        """
        if overrides:
            return self._replace(overrides).preprocess(
                images, return_tensors=return_tensors, input_data_format=input_data_format, device=device
            )
        _one_of("return_tensors", return_tensors, (None, "pt", "np"))
        _one_of("input_data_format", input_data_format, (None, "channels_first", "channels_last"))

        flat = list(_flatten(images))
        if not flat:
            raise ValueError("no images were given")
        shapes = {self._check(f"image {i}", image, input_data_format) for i, image in enumerate(flat)}
        if return_tensors is not None and len(shapes) > 1:
            raise ValueError(
                f"the images would come out in the shapes {sorted(shapes)}, which do not stack: "
                "resize or crop them, or pass return_tensors=None"
            )

        pixel_values = [self._process(image, input_data_format, device) for image in flat]
        if return_tensors is None:
            return PixelValues(pixel_values=pixel_values)
        batch = torch.stack(pixel_values)
        return PixelValues(pixel_values=batch if return_tensors == "pt" else batch.cpu().numpy())

    def to_dict(self) -> dict[str, Any]:
        """Every setting that is not None, under transformers' names, with `image_processor_type`."""
        settings = {name: value for name, value in vars(self).items() if value is not None}
        return {"image_processor_type": "DeiTImageProcessor", **settings}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **overrides: Any) -> "DeiTImageProcessor":
        """Build from `to_dict`'s dict or transformers'; keys that name no setting are ignored.

        Raises:
            ValueError: settings of another kind of processor, or one that cannot be used.
        """
        kind = config.get("image_processor_type") or config.get("feature_extractor_type")
        if kind is not None and kind not in _TYPES:
            raise ValueError(f"these are settings of a {kind}, whose defaults differ; expected {_TYPES[0]}")
        settings = {name: config[name] for name in _SETTINGS if config.get(name) is not None}
        return cls(**{**settings, **overrides})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **overrides: Any) -> "DeiTImageProcessor":
        """Read `preprocessor_config.json` from a local folder, or that file itself.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not valid JSON, or holds settings that `from_dict` refuses.
        """
        path = Path(folder)
        path = path / CONFIG_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")), **overrides)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json`, which transformers reads too."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        (path / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if value is not None)
        return f"{type(self).__name__}({settings})"

    def _replace(self, overrides: dict[str, Any]) -> "DeiTImageProcessor":
        unknown = sorted(set(overrides) - _SETTINGS)
        if unknown:
            raise TypeError(f"unknown arguments {unknown}; expected some of {sorted(_SETTINGS)}")
        return type(self)(**{**vars(self), **overrides})

    def _check(self, name: str, image: Any, data_format: str | None) -> tuple[int, int, int]:
        """Refuse what cannot be processed, looking at no pixel; return the shape that would come out."""
        if _images.is_pil(image):
            width, height = image.size
            _images.check_pixels(name, height, width)
            if self.do_convert_rgb:
                _images.check_convertible(name, image)
            elif image.mode not in ("L", "RGB", "RGBA"):
                raise ValueError(f"{name} has PIL mode {image.mode!r}; expected 'RGB' or do_convert_rgb=True")
            channels = len(image.getbands())
        elif isinstance(image, np.ndarray | torch.Tensor):
            channels, height, width = _images.check_array(name, image, data_format)
        else:
            raise TypeError(
                f"{name} is of type {type(image).__name__}; "
                "expected a PIL image, a numpy array, a torch tensor or a path"
            )
        channels = 3 if self.do_convert_rgb else channels
        for setting in ("image_mean", "image_std") if self.do_normalize else ():
            value = getattr(self, setting)
            if isinstance(value, tuple) and len(value) != channels:
                raise ValueError(
                    f"{name} has {channels} channels, {setting} {len(value)}; expected as many, or do_convert_rgb=True"
                )
        if self.do_resize:
            height, width = self._resized_size(height, width)
        if self.do_center_crop:
            height, width = self.crop_size["height"], self.crop_size["width"]
        if self.do_pad:
            padded = self.pad_size["height"], self.pad_size["width"]
            if height > padded[0] or width > padded[1]:
                raise ValueError(f"{name} would be {height} x {width}, larger than pad_size {padded}")
            height, width = padded
        return channels, height, width

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        edge = self.size.get("shortest_edge")
        if edge is None:
            return self.size["height"], self.size["width"]
        longest = int(edge * max(height, width) / min(height, width))
        return (edge, longest) if height <= width else (longest, edge)

    def _process(self, image: Any, data_format: str | None, device: torch.device | str | None) -> torch.Tensor:
        if _images.is_pil(image):
            pixels = _images.pil_to_tensor(image, rgb=bool(self.do_convert_rgb))
        else:
            pixels = _images.array_to_tensor(image, data_format, rgb=bool(self.do_convert_rgb))
        pixels = pixels.to(device=device).contiguous()
        if self.do_rescale and pixels.is_floating_point() and pixels.min() >= 0 and 0 < pixels.max() <= 1:
            warnings.warn(
                "do_rescale expects values from 0 to 255 and found a floating-point image within 0 to 1: "
                "pass do_rescale=False if it is rescaled already",
                stacklevel=4,
            )
        if self.do_resize:
            size = self._resized_size(*pixels.shape[1:])
            pixels = _resize(pixels, size, _INTERPOLATION[self.resample])
        if self.do_center_crop:
            pixels = _center_crop(pixels, self.crop_size["height"], self.crop_size["width"])
        if self.do_normalize:
            # In one pass: (x * s - mean) / std = (x - mean / s) / (std / s).
            scale = 1.0 / self.rescale_factor if self.do_rescale else 1.0
            mean, std = (
                torch.tensor(value, dtype=torch.float32, device=pixels.device).reshape(-1, 1, 1) * scale
                for value in (self.image_mean, self.image_std)
            )
            pixels = (pixels.float() - mean) / std
        elif self.do_rescale:
            pixels = pixels.float() * self.rescale_factor
        if self.do_pad:
            height, width = pixels.shape[1:]
            pixels = F.pad(pixels, (0, self.pad_size["width"] - width, 0, self.pad_size["height"] - height))
        return pixels.contiguous()


_SETTINGS = frozenset(DeiTImageProcessor.__init__.__kwdefaults__ or ())


def _flatten(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple):
        for image in images:
            yield from _flatten(image)
    elif isinstance(images, str | os.PathLike):
        yield _images.load_image(images)
    elif isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        yield from images
    else:
        yield images


def _resize(pixels: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    if tuple(pixels.shape[1:]) == size:
        return pixels
    # torch filters uint8 on the CPU only; elsewhere in float32, rounded back.
    through_float = pixels.dtype == torch.uint8 and pixels.device.type != "cpu"
    smooth = mode != "nearest-exact"
    resized = F.interpolate(
        (pixels.float() if through_float else pixels)[None],
        size,
        mode=mode,
        align_corners=False if smooth else None,
        antialias=smooth,
    )[0]
    return resized.clamp(0, 255).round().to(torch.uint8) if through_float else resized


def _center_crop(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    rows, columns = max(height - pixels.shape[1], 0), max(width - pixels.shape[2], 0)
    if rows or columns:
        top, left = rows // 2, columns // 2
        pixels = F.pad(pixels, (left, columns - left, top, rows - top))
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {allowed}")


def _size(name: str, size: Any, *, square: bool = True, shortest_edge: bool = False) -> dict[str, int]:
    allowed = [{"height", "width"}, {"shortest_edge"}] if shortest_edge else [{"height", "width"}]
    if isinstance(size, int):
        result = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, list | tuple) and len(size) == 2:
        result = {"height": size[0], "width": size[1]}
    else:
        result = dict(size) if isinstance(size, Mapping) else {}
    if set(result) not in allowed or any(type(v) is not int or v < 1 for v in result.values()):
        keys = " or ".join(str(sorted(names)) for names in allowed)
        raise ValueError(f"{name} is {size!r}; expected positive ints: one, (height, width), or a dict of {keys}")
    return result


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
