"""DeiT's image processor: resize, centre crop, rescale, normalise.

Arguments, defaults and results are those of `transformers.DeiTImageProcessor` (release 5, torchvision backend); what it
takes beyond them is refused, and docs/limits.md lists it. The arithmetic is torch's own, on whatever device the pixels
are.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from deit_fast.data import geometry
from deit_fast.data import images as _images
from deit_fast.data.pixel_values import PixelValues
from deit_fast.data.processor_settings import ProcessorSettings

if TYPE_CHECKING:
    import PIL.Image

    Image: TypeAlias = PIL.Image.Image | np.ndarray | torch.Tensor | str | os.PathLike[str]


class DeiTImageProcessor(ProcessorSettings):
    """Prepares images as `transformers.DeiTImageProcessor` does.

    Steps, each a method, and each with its `do_…` switch: convert to RGB (off by default), resize to `size` with
    antialiasing, centre crop to `crop_size`, multiply by `rescale_factor`, subtract `image_mean` and divide by
    `image_std`, pad to `pad_size` with zeros at the bottom and the right (off by default).

    The crop starts at row `(height - crop_height) // 2`, columns likewise. Where the crop is larger than the
    image, black fills the difference: `difference // 2` rows above, the rest below, columns likewise.

    Args:
        size: an int, `(height, width)`, or a dict: `{"height", "width"}`; or, keeping the aspect ratio,
            `{"shortest_edge"}`, `{"shortest_edge", "longest_edge"}` (the shortest edge unless the longest would pass
            the other) or `{"max_height", "max_width"}` (as large as fits in both). An int means a square, or the
            shortest edge with `default_to_square=False`.
        resample: Pillow's number of the filter: 0 nearest, 1 Lanczos (torch 2.12 on, on a CPU), 2 bilinear, 3 bicubic;
            or torchvision's InterpolationMode.
        crop_size, pad_size: an int, `(height, width)` or `{"height", "width"}`.
        image_mean, image_std: one number, or one a channel, in units of the rescaled image (0 to 1).
        input_data_format: "channels_first" or "channels_last"; by default whichever axis has 1, 3 or 4 entries, the
            first where both have. "none" is for arrays [H, W]; others are then taken for channels first. PIL images
            don't ask it.
        return_tensors: "pt" or "np" for one `[B, C, H, W]`; None for a list of `[C, H, W]` tensors.
        device: where to work; by default where each image is.
        data_format, disable_grouping, image_seq_length: taken, and not read, as in transformers: what comes out has
            its channels first.

    Raises:
        ValueError: an argument that cannot be used, by its name.
    """

    model_input_names = ("pixel_values",)

    def __call__(self, images: "Image | Sequence[Image]", **overrides: Any) -> PixelValues:
        """Same as `preprocess`."""
        return self.preprocess(images, **overrides)

    def preprocess(self, images: "Image | Sequence[Image]", **overrides: Any) -> PixelValues:
        """Prepare one image or a list of images.

        Args:
            images: PIL images, paths, numpy arrays or torch tensors, a batch `[B, …]` of them, or lists.
                Arrays are `[C, H, W]` or `[H, W, C]` with 1, 3 or 4 channels, or `[H, W]`, uint8 or floating point,
                from 0 to 255 unless `do_rescale=False`.
            overrides: any constructor argument, for this call.

        Returns:
            `.pixel_values`, float32; in the images' dtype where nothing normalises them, and nothing rescales bytes.

        Raises:
            ValueError, TypeError: before any image is processed, for an image of the wrong rank, number of
                channels or dtype, of no pixels or too many, and for images that would not stack.
        """
        if overrides:
            return self.replace(**overrides).preprocess(images)

        flat = list(_flatten(images))
        if not flat:
            raise ValueError("no images were given")
        shapes = {self._check(f"image {i}", image) for i, image in enumerate(flat)}
        if self.return_tensors is not None and len(shapes) > 1:
            raise ValueError(
                f"the images would come out in the shapes {sorted(shapes)}, which do not stack: "
                "resize or crop them, or pass return_tensors=None"
            )

        pixel_values = [self._process(image) for image in flat]
        if self.return_tensors is None:
            return PixelValues(pixel_values=pixel_values)
        batch = torch.stack(pixel_values)
        return PixelValues(pixel_values=batch if self.return_tensors == "pt" else batch.detach().cpu().numpy())

    # The steps, by the names and arguments of transformers; images are [..., C, H, W] ---------------------------------

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A PIL image, numpy array or tensor as a tensor [C, H, W] in its own dtype."""
        rgb = bool(do_convert_rgb)
        if _images.is_pil(image):
            pixels = _images.pil_to_tensor(image, rgb)
        else:
            pixels = _images.array_to_tensor(image, input_data_format, rgb)
        return pixels.to(device=device).contiguous()

    def resize(self, image: Tensor, size: Any, resample: Any = 2, antialias: bool = True) -> Tensor:
        """Resized to any `size` and by any filter that the constructor takes."""
        target = geometry.size_of("size", size)
        geometry.require_keys("size", "resize", target, geometry.RESIZABLE)
        height, width = geometry.resized_size(target, *image.shape[-2:])
        return geometry.resize(image, (height, width), geometry.resampling(resample), antialias)

    def center_crop(self, image: Tensor, size: Any) -> Tensor:
        """The middle, [..., C, height, width] of `size`."""
        target = geometry.size_of("size", size)
        geometry.require_keys("size", "center_crop", target, (geometry.EXACT,))
        return geometry.center_crop(image, target["height"], target["width"])

    def rescale(self, image: Tensor, scale: float) -> Tensor:
        """`image * scale`."""
        return image * scale

    def normalize(self, image: Tensor, mean: Any, std: Any) -> Tensor:
        """`(image - mean) / std` of a floating-point image; mean and std: one number, or one a channel."""
        if not image.is_floating_point():
            raise TypeError(f"normalize takes a floating-point image, got {image.dtype}")
        channels = [torch.as_tensor(v, dtype=image.dtype, device=image.device).reshape(-1, 1, 1) for v in (mean, std)]
        return (image - channels[0]) / channels[1]

    def rescale_and_normalize(
        self,
        images: Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
    ) -> Tensor:
        """Either, both in one pass, or neither."""
        if do_normalize:
            # (x * s - mean) / std = (x - mean / s) / (std / s).
            scale = 1.0 / rescale_factor if do_rescale else 1.0
            mean, std = (torch.tensor(value, dtype=torch.float32) * scale for value in (image_mean, image_std))
            return self.normalize(images.float(), mean, std)
        return self.rescale(images, rescale_factor) if do_rescale else images

    def pad(self, images: Sequence[Tensor], pad_size: Any = None, fill_value: float = 0) -> list[Tensor]:
        """Padded at the bottom and the right to `pad_size`, by default to the largest height and width of all."""
        if pad_size is None:
            pad_size = tuple(max(image.shape[axis] for image in images) for axis in (-2, -1))
        target = geometry.size_of("pad_size", pad_size)
        geometry.require_keys("pad_size", "pad", target, (geometry.EXACT,))
        return [geometry.pad(image, target["height"], target["width"], fill_value) for image in images]

    # One image through all of them ------------------------------------------------------------------------------------

    def _check(self, name: str, image: Any) -> tuple[int, int, int]:
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
            channels, height, width = _images.check_array(name, image, self.input_data_format)
        else:
            raise TypeError(
                f"{name} is of type {type(image).__name__}; "
                "expected a PIL image, a numpy array, a torch tensor or a path"
            )
        channels = 3 if self.do_convert_rgb else channels
        for setting in ("image_mean", "image_std") if self.do_normalize else ():
            value = getattr(self, setting)
            if isinstance(value, tuple) and len(value) not in (1, channels):
                raise ValueError(
                    f"{name} has {channels} channels, {setting} {len(value)}; expected as many, or do_convert_rgb=True"
                )
        if self.do_resize and self.size is not None:
            height, width = geometry.resized_size(self.size, height, width)
            if height * width == 0:
                raise ValueError(f"{name} would be resized to {height} x {width}; expected a larger size")
        if self.do_center_crop and self.crop_size is not None:
            height, width = self.crop_size["height"], self.crop_size["width"]
        if self.do_pad and self.pad_size is not None:
            padded = self.pad_size["height"], self.pad_size["width"]
            if height > padded[0] or width > padded[1]:
                raise ValueError(f"{name} would be {height} x {width}, larger than pad_size {padded}")
            height, width = padded
        return channels, height, width

    def _process(self, image: Any) -> Tensor:
        pixels = self.process_image(image, self.do_convert_rgb, self.input_data_format, self.device)
        if self.do_rescale and pixels.is_floating_point() and pixels.min() >= 0 and 0 < pixels.max() <= 1:
            warnings.warn(
                "do_rescale expects values from 0 to 255 and found a floating-point image within 0 to 1: "
                "pass do_rescale=False if it is rescaled already",
                stacklevel=4,
            )
        if self.do_resize:
            pixels = self.resize(pixels, self.size, self.resample)
        if self.do_center_crop:
            pixels = self.center_crop(pixels, self.crop_size)
        pixels = self.rescale_and_normalize(
            pixels,
            bool(self.do_rescale),
            self.rescale_factor or 1.0,
            bool(self.do_normalize),
            self.image_mean,
            self.image_std,
        )
        if self.do_pad:
            (pixels,) = self.pad([pixels], self.pad_size)
        return pixels.contiguous()


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
