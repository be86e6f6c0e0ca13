"""Image files, PIL images and arrays: what is refused, and how each becomes a tensor [C, H, W].

Pillow is imported only to read files and to convert between its modes.
"""

import os
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from deit_fast._extras import require

if TYPE_CHECKING:
    import PIL.Image

MAX_PIXELS = 178_956_970  # where Pillow, as it comes, takes an image for a decompression bomb

_CHANNELS = (1, 3, 4)
_DTYPES = ("uint8", "float16", "bfloat16", "float32", "float64")
_RANGELESS_MODES = ("I", "F")


def load_image(path: str | os.PathLike[str]) -> "PIL.Image.Image":
    """Read an image file: RGB, turned upright by its EXIF orientation.

    Transparency is dropped, not blended; 16-bit grey is brought to 8 bits. An orientation that can't be read is none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, is truncated, has no pixels or more than `MAX_PIXELS` (its header is
            asked, before anything is decoded).
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{name}: no such image file")
    with open(name, "rb") as file:
        return decode(name, file)


def decode(name: str, file: BinaryIO) -> "PIL.Image.Image":
    """As `load_image`, of an open file that errors call `name`."""
    require("PIL", extra="data")
    import PIL.Image

    try:
        image = PIL.Image.open(file)
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{name}: too many pixels: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is not an image that Pillow can read") from error
    check_pixels(name, image.height, image.width)
    check_convertible(name, image)
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} cannot be decoded: {error}") from error
    _turn_upright(image)
    return to_rgb(image)


def is_pil(image: Any) -> bool:
    """Whether this is a PIL image, found out without importing Pillow."""
    return any((base.__module__, base.__name__) == ("PIL.Image", "Image") for base in type(image).__mro__)


def check_pixels(name: str, height: int, width: int) -> None:
    """Refuse an image of no pixels or of too many.

    Raises:
        ValueError: it has none, or more than `MAX_PIXELS`.
    """
    if height * width == 0:
        raise ValueError(f"{name} is {height} x {width}: it has no pixels")
    if height * width > MAX_PIXELS:
        raise ValueError(f"{name} is {height} x {width} = {height * width:,} pixels; the limit is {MAX_PIXELS:,}")


def check_convertible(name: str, image: "PIL.Image.Image") -> None:
    """Refuse a PIL mode that cannot be converted to RGB without knowing its range.

    Raises:
        ValueError: the image has one.
    """
    if image.mode in _RANGELESS_MODES:
        raise ValueError(f"{name} has PIL mode {image.mode!r}, whose range is unknown; expected 'RGB'")


def check_array(name: str, image: np.ndarray | torch.Tensor, data_format: str | None) -> tuple[int, int, int]:
    """Refuse an array that is no image; return its (channels, height, width).

    Raises:
        ValueError: its shape is neither [C, H, W], [H, W, C] nor [H, W], or `check_pixels` refuses it.
        TypeError: its dtype is neither uint8 nor floating point.
    """
    shape = tuple(image.shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"{name} has shape {shape}; expected [C, H, W], [H, W, C] or [H, W]")
    if str(image.dtype).removeprefix("torch.") not in _DTYPES:
        raise TypeError(f"{name} has dtype {image.dtype}; expected uint8 or floating point")
    axis = channel_axis(shape, data_format)
    if axis is None:
        raise ValueError(f"{name} has shape {shape}; expected 1, 3 or 4 channels, {data_format or 'first or last'}")
    height, width = shape[-2:] if axis <= 0 else shape[:2]
    check_pixels(name, height, width)
    return 1 if axis < 0 else shape[axis], height, width


def channel_axis(shape: tuple[int, ...], data_format: str | None) -> int | None:
    """0 or 2; the first axis where both could be. -1 of an image [H, W], which has none; None where neither can."""
    if len(shape) == 2:
        return -1
    if data_format == "none":
        data_format = "channels_first"
    if data_format != "channels_last" and shape[0] in _CHANNELS:
        return 0
    if data_format != "channels_first" and shape[2] in _CHANNELS:
        return 2
    return None


def pil_to_tensor(image: "PIL.Image.Image", rgb: bool) -> torch.Tensor:
    """[C, H, W] uint8; with `rgb`, transparency is blended onto white."""
    if rgb:
        import PIL.Image

        image = _to_8_bit(image)
        if "A" in image.getbands() or "transparency" in image.info:
            white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)


def array_to_tensor(image: np.ndarray | torch.Tensor, data_format: str | None, rgb: bool) -> torch.Tensor:
    """[C, H, W] in the array's dtype; with `rgb`, grey is repeated and alpha blended onto white.

    Raises:
        ValueError: alpha is to be blended into floating-point values outside 0 to 1, whose white is unknown.
    """
    # Copied, since an array may be read-only or have negative strides.
    pixels = image if isinstance(image, torch.Tensor) else torch.from_numpy(image.copy())
    axis = channel_axis(tuple(pixels.shape), data_format)
    pixels = pixels[None] if axis == -1 else pixels.permute(2, 0, 1) if axis == 2 else pixels
    if not rgb or pixels.shape[0] == 3:
        return pixels
    if pixels.shape[0] == 1:
        return pixels.expand(3, -1, -1)
    if pixels.is_floating_point() and (pixels.min() < 0 or pixels.max() > 1):
        raise ValueError("to blend alpha onto white, floating-point values must be from 0 to 1")
    white = 1.0 if pixels.is_floating_point() else 255.0
    alpha = pixels[3:] / white
    blended = pixels[:3] * alpha + white * (1 - alpha)
    return blended if pixels.is_floating_point() else blended.round().to(torch.uint8)


def _turn_upright(image: "PIL.Image.Image") -> None:
    import PIL.ImageOps

    with suppress(OSError, SyntaxError, ValueError, struct.error):  # of broken EXIF, beside a sound image
        PIL.ImageOps.exif_transpose(image, in_place=True)


def to_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    if image.mode == "RGB":
        return image  # which convert would copy
    if image.mode == "P":
        image.info.pop("transparency", None)  # Pillow warns of dropping it
    return _to_8_bit(image).convert("RGB")


def _to_8_bit(image: "PIL.Image.Image") -> "PIL.Image.Image":
    if not image.mode.startswith("I;16"):
        return image
    import PIL.Image

    # Pillow's own conversion clips at 255, which turns such an image white.
    return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
