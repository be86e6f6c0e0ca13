"""Where pixels come to lie: sizes, resampling, the centre crop and padding, on torch's own operators.

The names of sizes and filters are those of transformers, torchvision and Pillow. Images are [..., C, H, W].
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Size = dict[str, int]

EXACT = frozenset({"height", "width"})
_SHORTEST, _WITHIN = frozenset({"shortest_edge"}), frozenset({"shortest_edge", "longest_edge"})
_MAXIMA = frozenset({"max_height", "max_width"})
# What a size may be: what tells where to resize to, and what transformers' files hold where nothing is resized.
RESIZABLE = (EXACT, _SHORTEST, _WITHIN, _MAXIMA)
_KNOWN = (*RESIZABLE, frozenset({"longest_edge"}), frozenset({"min_pixels", "max_pixels"}))

# Pillow's numbers for its filters, which is what the configuration file stores, and torch's names for them.
_MODES = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_NUMBERS = {mode: number for number, mode in _MODES.items()}
_NEAREST = "nearest"  # torchvision's, which Pillow doesn't have


def size_of(name: str, size: Any, square: bool = True) -> Size:
    """`size` as a dict: an int is a square or the shortest edge, a pair is (height, width).

    Raises:
        ValueError: keys that mean nothing together, or values other than positive ints.
    """
    if isinstance(size, int):
        found = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, list | tuple) and len(size) == 2:
        found = {"height": size[0], "width": size[1]}
    elif isinstance(size, Mapping):
        found = dict(size)
    else:  # transformers' SizeDict gives pairs
        found = dict(size) if type(size).__name__ == "SizeDict" else {}
    if frozenset(found) not in _KNOWN or any(type(value) is not int or value < 1 for value in found.values()):
        raise ValueError(
            f"{name} is {size!r}; expected positive ints: one, (height, width), or a dict of {_names(_KNOWN)}"
        )
    return found


def require_keys(name: str, step: str, size: Size | None, allowed: tuple[frozenset[str], ...]) -> None:
    """Refuse a size that `step` can't use.

    Raises:
        ValueError: there is none, or it has other keys.
    """
    if size is None:
        raise ValueError(f"{step} needs {name}")
    if frozenset(size) not in allowed:
        raise ValueError(f"{name} is {size!r}; {step} takes {_names(allowed)}")


def _names(sets: tuple[frozenset[str], ...]) -> str:
    return " or ".join(str(sorted(keys)) for keys in sets)


def resized_size(size: Size, height: int, width: int) -> tuple[int, int]:
    """Height and width of an image after a resize to `size`, by transformers' roundings."""
    keys = frozenset(size)
    if keys == EXACT:
        return size["height"], size["width"]
    if keys == _MAXIMA:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return int(height * scale), int(width * scale)
    short, long = sorted((height, width))
    edge: int = size["shortest_edge"]
    longest = int(edge * long / short)
    if keys == _WITHIN and long / short * edge > size["longest_edge"]:
        exact = size["longest_edge"] * short / long
        edge = round(exact)
        # An image that has the edge already is left alone, whatever its other one.
        longest = long if edge == short else int(exact * long / short)
    return (edge, longest) if height <= width else (longest, edge)


def resampling(resample: Any) -> int | str:
    """Pillow's number of a filter given as that, or as torchvision's `InterpolationMode` or its value.

    Raises:
        ValueError: torch doesn't have it.
    """
    if isinstance(resample, int) and not isinstance(resample, bool) and resample in _MODES:
        return int(resample)
    mode = getattr(resample, "value", resample)
    if mode == _NEAREST:
        return _NEAREST
    if isinstance(mode, str) and mode in _NUMBERS:
        return _NUMBERS[mode]
    raise ValueError(
        f"resample is {resample!r}; expected 0 (nearest), 1 (Lanczos), 2 (bilinear) or 3 (bicubic), or torchvision's "
        "InterpolationMode of one of them: torch has no box or Hamming filter"
    )


def resize(pixels: Tensor, size: tuple[int, int], resample: int | str, antialias: bool = True) -> Tensor:
    """`pixels` at another height and width, in their dtype."""
    height, width = pixels.shape[-2:]
    if (height, width) == size:
        return pixels
    mode = _MODES[resample] if isinstance(resample, int) else resample
    on_cpu = pixels.device.type == "cpu"
    if mode == "lanczos" and not on_cpu:
        warnings.warn("torch has Lanczos on the CPU only: images elsewhere are resized bicubically", stacklevel=2)
        mode = "bicubic"
    smooth = not mode.startswith("nearest")
    # torch filters bytes on the CPU only; elsewhere they, like half precision, go through float32.
    native = (torch.float32, torch.float64, torch.uint8) if on_cpu or not smooth else (torch.float32, torch.float64)
    planes = pixels.reshape(-1, *pixels.shape[-3:])
    resized = F.interpolate(
        planes if planes.dtype in native else planes.float(),
        size,
        mode=mode,
        align_corners=False if smooth else None,
        antialias=smooth and antialias,
    )
    if pixels.dtype == torch.uint8 and resized.dtype != torch.uint8:
        resized = resized.clamp(0, 255).round()
    return resized.to(pixels.dtype).reshape(*pixels.shape[:-2], *size)


def center_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """The middle of `pixels`, with black where they are too small."""
    rows, columns = max(height - pixels.shape[-2], 0), max(width - pixels.shape[-1], 0)
    if rows or columns:
        top, left = rows // 2, columns // 2
        pixels = F.pad(pixels, (left, columns - left, top, rows - top))
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def pad(pixels: Tensor, height: int, width: int, value: float = 0) -> Tensor:
    """`pixels` with rows below and columns on the right, up to `height` and `width`.

    Raises:
        ValueError: they are larger.
    """
    rows, columns = height - pixels.shape[-2], width - pixels.shape[-1]
    if rows < 0 or columns < 0:
        raise ValueError(f"an image of {tuple(pixels.shape[-2:])} pixels is larger than pad_size {(height, width)}")
    return F.pad(pixels, (0, columns, 0, rows), value=value)
